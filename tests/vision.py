"""Tiny random models of images and text, with processors, as a user would have them on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image

TEXT = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
CHAT = ("{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
        "{{ c.text }}{% endif %}{% endfor %}{% endfor %}")
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos": "<|vision_start|>",
                "vision_eos": "<|vision_end|>"}


def tokenizer(special: dict[str, str]) -> Any:
    """Bytes are tokens 3 to 255; the special ones of the model follow from 256 on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet[:253])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                      extra_special_tokens=special)


def spread(model: Any) -> Any:
    """The default init of 0.02 makes every logit alike; spread them so that tests can tell."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.15)
    return model


def save_llava(path: Path, *, chat: bool = False, tied: bool = False, tower: int = 32, seed: int = 0) -> Path:
    """A LLaVA: a CLIP tower (``tower`` wide) that makes 16 tokens of an image, a projector, a Llama of 4 blocks."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = tf.CLIPVisionConfig(hidden_size=tower, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                                 image_size=16, patch_size=4, projection_dim=32)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT, tie_word_embeddings=tied),
                            image_token_id=256)
    torch.manual_seed(seed)
    spread(tf.AutoModelForImageTextToText.from_config(config)).save_pretrained(path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer({"image_token": "<image>"}), patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT if chat else None,
    ).save_pretrained(path)
    return path


def _qwen_ids() -> dict[str, int]:
    return {"image_token_id": 256, "video_token_id": 257, "vision_start_token_id": 258, "vision_end_token_id": 259}


def save_qwen(path: Path, *, seed: int = 0) -> Path:
    """A Qwen2.5-VL: windowed vision attention, three-dimensional positions, as many tokens as the image is large."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 64,
              "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": _MROPE}, **_qwen_ids())
    return _save_qwen(path, config, seed)


def save_deepstack(path: Path, *, seed: int = 0) -> Path:
    """A Qwen3-VL, which adds features of the image to the hidden states between decoder blocks."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
              "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    text = {**TEXT, "head_dim": 16, "rope_parameters": _MROPE}
    return _save_qwen(path, tf.Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_ids()), seed)


def _save_qwen(path: Path, config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    spread(tf.AutoModelForImageTextToText.from_config(config)).save_pretrained(path)
    processor = QwenImages(_qwen_images(), tokenizer(_QWEN_TOKENS))
    processor.image_processor.save_pretrained(path)
    processor.tokenizer.save_pretrained(path)
    return path


def _qwen_images() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2,
                                    size={"shortest_edge": 256, "longest_edge": 1024})


class QwenImages(tf.Qwen2_5_VLProcessor):
    """Qwen's own processor less its part for videos, which needs torchvision to be installed."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = "<|image_pad|>", 256
        self.video_token, self.video_token_id = "<|video_pad|>", 257
        tf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def at(cls, path: Path) -> QwenImages:
        return cls(_qwen_images(), tf.AutoTokenizer.from_pretrained(path))


def save_images(folder: Path, n: int = 8, *, seed: int = 0) -> Path:
    """``n`` noisy images of several sizes, ``0.png`` and so on, each with a caption beside it."""
    draw = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        pixels = draw.integers(0, 256, (16 + 4 * (i % 3), 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Picture {i} of {n}, which shows noise of kind {i * i}.")
    return folder


def save_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
