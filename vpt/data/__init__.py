"""Data for training and evaluation: built of annotations, and examined before it is used."""
