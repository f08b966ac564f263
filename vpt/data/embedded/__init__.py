"""Generated pictures with questions about them: what the embedded model is trained on."""
