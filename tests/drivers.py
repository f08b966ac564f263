"""What makes a run do as a test wants: a script of tokens, or raised logits."""

from zlib import crc32

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, set_seed

from vpt.branches import Proposal
from vpt.images import load_image
from vpt.inference.conversation import Conversation
from vpt.inference.events import Append, Step
from vpt.inference.request import Request
from vpt.inference.stream import AppendedImage
from vpt.model.generation import PerceptionLogitsProcessor
from vpt.model.processing import TokenPiece
from vpt.protocol.tokens import TURN_END

IMAGE = load_image(Image.effect_noise((112, 84), 50).convert("RGB"))


class Script:
    """A driver that answers with given tokens and remembers what it was asked to append."""

    def __init__(self, processor, vocabulary, *texts, **options):
        self.ids = [i for text in texts for i in processor.encode_text(text).ids]
        self.appended, self.rules, self.events = [], [], []
        images = options.pop("images", [IMAGE])
        propose = options.pop("propose", None)
        request = Request(images, options.pop("question", "What?"), **options)
        conversation = Conversation(request, processor, vocabulary, propose=propose).run()
        given, step = iter(self.ids), None
        while True:
            try:
                item = conversation.send(step)
            except StopIteration:
                break
            step = None
            if not isinstance(item, Append):
                self.events.append(item)
                continue
            self.appended.append(list(item.pieces))
            self.rules.append(item.rule)
            appended = [
                AppendedImage("reencode", (2, 2), 4, False, None)
                for piece in item.pieces
                if not isinstance(piece, TokenPiece)
            ]
            step = Step(next(given), num_tokens=10, images=appended)
        self.trace = self.events[-1].trace

    def of_type(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class SomewhereDetector:
    """Finds any phrase at a place that depends on its letters; some phrases nowhere."""

    def propose(self, image, phrase):
        (width, height), number = image.size, crc32(phrase.encode())
        x, y = number % width, number % height
        box = x, y, min(x + 20, width), min(y + 10, height)
        return [Proposal(box, 0.5, phrase)] * (number % 3)


class Eager(LogitsProcessor):
    """Makes a model call often: raises the logits of openers, here and now."""

    def __init__(self, ids, amount):
        self.ids, self.amount = ids, amount

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.ids] += self.amount
        return scores


def generate_turns(model, processor, grammar, permitted, wanted, num_rows):
    """Sample turns by transformers' ``generate``, calls and content made likely; ids by row."""
    ids = grammar.vocabulary.ids
    prompt = torch.tensor([processor.encode_text("Is it?<|im_end|>").ids]).repeat(num_rows, 1)
    ruled = PerceptionLogitsProcessor(grammar, prompt.shape[1], permitted)
    set_seed(0)
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=LogitsProcessorList([Eager(wanted, 4.0), ruled]),
            do_sample=True,
            max_new_tokens=24,
            eos_token_id=ids[TURN_END],
            pad_token_id=ids["<|endoftext|>"],
        )
    return out[:, prompt.shape[1] :].tolist()
