"""Checkpoints that tests make: the real architectures from small configurations, saved as transformers saves them.

Weights are drawn from a seed, larger than transformers' own, so that values tell in the output.
"""

import atexit
import functools
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

__all__ = ["MAKERS", "checkpoint", "drawn"]

logging.disable_progress_bar()
logging.set_verbosity_error()

WORDS = ("a", "red", "blue", "green", "black", "bird", "long", "text", "the", "of", "passage", "query", ":", ".", ",")
SIDE = 32


def drawn(model: Any, gain: float = 1.0) -> Any:
    """The model with weights of a seed, in float32, ready to run; each layer's output is `gain` times as large as its input."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                weight.copy_(gain * torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            elif name.endswith(".weight"):
                weight.fill_(1)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model.eval()


def word_pieces(**special: Any) -> Any:
    """A tokenizer of a few words and of single characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokens += [each for each in string.ascii_lowercase + string.digits if each not in tokens]
    tokens += [f"##{each}" for each in string.ascii_lowercase + string.digits]
    made = Tokenizer(models.WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**names, "model_max_length": 64, **special})


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = word_pieces()
    drawn(BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **TINY))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _processor(folder: Path, name: str, **settings: Any) -> None:
    import transformers

    getattr(transformers, name)(**settings).save_pretrained(folder)


def _vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTModel

    drawn(ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **TINY))).save_pretrained(folder)
    _processor(folder, "ViTImageProcessorPil", size={"height": SIDE, "width": SIDE})


def _dinov2(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    drawn(Dinov2Model(Dinov2Config(image_size=SIDE, patch_size=8, **sizes))).save_pretrained(folder)
    _processor(folder, "BitImageProcessorPil", size={"shortest_edge": 36}, crop_size={"height": SIDE, "width": SIDE})


def _resnet(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    drawn(ResNetModel(config)).save_pretrained(folder)
    _processor(folder, "ConvNextImageProcessorPil", size={"shortest_edge": 224})


def _efficientnet(folder: Path) -> None:
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(image_size=64, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128)
    drawn(EfficientNetModel(config), gain=1.7).save_pretrained(folder)
    _processor(folder, "EfficientNetImageProcessorPil", size={"height": 64, "width": 64})


MAKERS: dict[str, Callable[[Path], None]] = {
    "bert": _bert,
    "dinov2": _dinov2,
    "efficientnet": _efficientnet,
    "resnet": _resnet,
    "vit": _vit,
}
"""Kind -> what writes its checkpoint into a folder."""


@functools.cache
def checkpoint(kind: str) -> Path:
    """The folder of a checkpoint, made once a process; it is not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix=f"braid-{kind}-"))
    atexit.register(shutil.rmtree, folder)
    MAKERS[kind](folder)
    return folder
