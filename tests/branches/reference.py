"""groundingdino-py as the reference of the grounding branch: small, with random weights."""

import importlib
from types import SimpleNamespace
from unittest.mock import patch

import torch
from transformers import BertConfig, BertModel

CONFIG = {
    "modelname": "groundingdino",
    "backbone": "swin_T_224_1k",
    "position_embedding": "sine",
    "pe_temperatureH": 20,
    "pe_temperatureW": 20,
    "return_interm_indices": [1, 2, 3],
    "backbone_freeze_keywords": None,
    "enc_layers": 1,
    "dec_layers": 2,
    "pre_norm": False,
    "dim_feedforward": 32,
    "hidden_dim": 256,  # the package fixes the width of its text positions
    "dropout": 0.0,
    "nheads": 4,
    "num_queries": 20,
    "query_dim": 4,
    "num_patterns": 0,
    "num_feature_levels": 4,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "two_stage_type": "standard",
    "two_stage_bbox_embed_share": False,
    "two_stage_class_embed_share": False,
    "transformer_activation": "relu",
    "dec_pred_bbox_embed_share": True,
    "dn_box_noise_scale": 1.0,
    "dn_label_noise_ratio": 0.5,
    "embed_init_tgt": True,
    "dn_labelbook_size": 20,
    "max_text_len": 256,
    "text_encoder_type": "bert-base-uncased",
    "use_text_enhancer": True,
    "use_fusion_layer": True,
    "use_checkpoint": False,
    "use_transformer_ckpt": False,
    "use_text_cross_attention": True,
    "text_dropout": 0.0,
    "fusion_dropout": 0.0,
    "fusion_droppath": 0.1,
    "sub_sentence_present": True,
}
TEXT_NUMBERS = {
    "vocab_size": 5000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,  # of 64 channels, as in BERT base
    "intermediate_size": 16,
    "max_position_embeddings": 300,
    "initializer_range": 0.2,
}
_PACKAGE = "groundingdino.models.GroundingDINO"


class TextEncoder(torch.nn.Module):
    """The package's ``BertModelWarper``, which needs methods that transformers 5 lacks."""

    def __init__(self, bert_model):
        super().__init__()
        self.config, self.embeddings = bert_model.config, bert_model.embeddings
        self.encoder, self.pooler = bert_model.encoder, bert_model.pooler

    def forward(self, input_ids, token_type_ids, attention_mask, position_ids):
        hidden_states = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids
        )
        bias = torch.zeros_like(attention_mask, dtype=hidden_states.dtype)
        bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        hidden_states = self.encoder(hidden_states, attention_mask=bias[:, None])[0]
        return {"last_hidden_state": hidden_states}


def tiny_swin(name, pretrain_img_size, **kwargs):
    swin = importlib.import_module(f"{_PACKAGE}.backbone.swin_transformer").SwinTransformer
    sizes = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    return swin(pretrain_img_size=pretrain_img_size, **sizes, **kwargs)


def build_package_encoder(tokenizer):
    """The package's ``GroundingDINO`` with random weights that spread boxes and scores."""
    settings = importlib.import_module("groundingdino.util.slconfig").SLConfig
    module = importlib.import_module(f"{_PACKAGE}.groundingdino")
    backbone = importlib.import_module(f"{_PACKAGE}.backbone.backbone")
    text = SimpleNamespace(
        get_tokenlizer=lambda _: tokenizer,
        get_pretrained_language_model=lambda _: BertModel(BertConfig(**TEXT_NUMBERS)),
    )
    torch.manual_seed(0)
    with (
        patch.object(backbone, "build_swin_transformer", tiny_swin),
        patch.object(module, "BertModelWarper", TextEncoder),
        patch.object(module, "get_tokenlizer", text),
    ):
        encoder = module.build_groundingdino(settings(cfg_dict=CONFIG)).eval()
    spread(encoder, encoder.transformer.decoder.norm)
    return encoder


def spread(encoder, last_norm):
    """Let boxes differ, whose head starts at zero, and scores, which a random model saturates."""
    with torch.no_grad():
        last_norm.weight *= 0.05
        for weight in encoder.bbox_embed.parameters():
            torch.nn.init.normal_(weight, std=0.1)
