"""Checkpoints that tests make: the real architectures from small configurations, saved as transformers saves them.

Weights are drawn from a seed, larger than transformers' own, so that values tell in the output.
"""

import atexit
import functools
import shutil
import string
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

__all__ = ["MAKERS", "SIDE", "checkpoint", "drawn"]

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


def _clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = word_pieces(model_max_length=77, eos_token="[SEP]", bos_token="[CLS]")
    text = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=text, vision_config={**TINY, "image_size": SIDE, "patch_size": 8}, projection_dim=24
    )
    drawn(CLIPModel(config)).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    _processor(folder, "CLIPImageProcessorPil", **size)
    tokenizer.save_pretrained(folder)


def _siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    tokenizer = word_pieces(model_max_length=64)
    text = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = SiglipConfig(text_config=text, vision_config={**TINY, "image_size": SIDE, "patch_size": 8})
    drawn(SiglipModel(config), gain=2.0).save_pretrained(folder)
    _processor(folder, "SiglipImageProcessorPil", size={"height": SIDE, "width": SIDE})
    tokenizer.save_pretrained(folder)


def _clap(folder: Path) -> None:
    from transformers import ClapConfig, ClapModel

    tokenizer = word_pieces(model_max_length=60)
    sizes = {"patch_embeds_hidden_size": 16, "hidden_size": 64, "depths": [1, 1, 1], "num_attention_heads": [2, 2, 2]}
    audio = {**sizes, "num_mel_bins": 64, "spec_size": 128, "window_size": 4, "enable_fusion": True}
    text = {
        **TINY,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "type_vocab_size": 1,
    }
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    drawn(ClapModel(config)).save_pretrained(folder)
    _processor(folder, "ClapFeatureExtractor", feature_size=64, truncation="fusion", max_length_s=2)
    tokenizer.save_pretrained(folder)


WAVE = {"conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4), "num_feat_extract_layers": 3}


def _wav2vec2(folder: Path, norm: str = "group") -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        **TINY, **WAVE, feat_extract_norm=norm, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    drawn(Wav2Vec2Model(config)).save_pretrained(folder)
    _processor(folder, "Wav2Vec2FeatureExtractor", do_normalize=True, return_attention_mask=norm == "layer")


def _hubert(folder: Path) -> None:
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(
        **TINY, **WAVE, feat_extract_norm="layer", num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    drawn(HubertModel(config)).save_pretrained(folder)
    _processor(folder, "Wav2Vec2FeatureExtractor", do_normalize=True, return_attention_mask=True)


def _whisper(folder: Path) -> None:
    from transformers import WhisperConfig, WhisperModel

    sizes = {
        f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in {"layers": 2, "ffn_dim": 64}.items()
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(d_model=32, vocab_size=60, num_mel_bins=80, **sizes, **heads, **_ends(2))
    drawn(WhisperModel(config)).save_pretrained(folder)
    _processor(folder, "WhisperFeatureExtractor", feature_size=80)


def _ends(token: int) -> dict[str, int]:
    return {f"{name}_token_id": token for name in ("pad", "bos", "eos", "decoder_start")}


def _ast(folder: Path) -> None:
    from transformers import ASTConfig, ASTModel

    drawn(ASTModel(ASTConfig(**TINY, max_length=200))).save_pretrained(folder)
    with warnings.catch_warnings():
        # Of its own 128 mel bands one has no frequency.
        warnings.simplefilter("ignore")
        _processor(folder, "ASTFeatureExtractor", max_length=200)


def _videomae(folder: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel

    sizes = {"image_size": SIDE, "patch_size": 8, "num_frames": 4}
    drawn(VideoMAEModel(VideoMAEConfig(**TINY, **sizes)), gain=1.5).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    _processor(folder, "VideoMAEImageProcessorPil", **size)


def _xclip(folder: Path) -> None:
    from transformers import XCLIPConfig, XCLIPModel

    text = {**TINY, "vocab_size": 64, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    frames = {"mit_hidden_size": 24, "mit_intermediate_size": 48, "mit_num_attention_heads": 4}
    config = XCLIPConfig(
        text_config=text,
        vision_config={**TINY, **frames, "image_size": SIDE, "patch_size": 8},
        projection_dim=24,
        prompt_num_attention_heads=4,
    )
    drawn(XCLIPModel(config)).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    _processor(folder, "VideoMAEImageProcessorPil", **size)


def _visual_bert(folder: Path) -> None:
    from transformers import VisualBertConfig, VisualBertModel

    tokenizer = word_pieces()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "visual_embedding_dim": TINY["hidden_size"]}
    drawn(VisualBertModel(VisualBertConfig(**TINY, **sizes, pad_token_id=0))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _lxmert(folder: Path) -> None:
    from transformers import LxmertConfig, LxmertModel

    tokenizer = word_pieces()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "visual_feat_dim": TINY["hidden_size"]}
    layers = {"l_layers": 2, "x_layers": 2, "r_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    drawn(LxmertModel(LxmertConfig(**sizes, **layers, intermediate_size=64))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _perceiver(folder: Path) -> None:
    from transformers import PerceiverConfig, PerceiverForMultimodalAutoencoding

    sizes = {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4}
    inputs = {"num_frames": 4, "audio_samples_per_frame": 640, "output_shape": [1, 4, 16, 16], "num_labels": 7}
    config = PerceiverConfig(**sizes, **inputs, num_cross_attention_heads=1, output_num_channels=16, image_size=4)
    drawn(PerceiverForMultimodalAutoencoding(config)).save_pretrained(folder)
    size = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 20, "width": 20}}
    _processor(folder, "PerceiverImageProcessorPil", **size)


def _idefics(folder: Path) -> None:
    import torch
    from transformers import IdeficsConfig, IdeficsModel

    tokenizer = word_pieces(bos_token="[CLS]", eos_token="[SEP]", model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<image>"]})
    vision = {"embed_dim": 32, "image_size": SIDE, "patch_size": 8, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    resampler = {"use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    config = IdeficsConfig(
        **TINY,
        vocab_size=len(tokenizer) - 2,
        additional_vocab_size=2,
        vision_config=vision | layers,
        use_resampler=True,
        perceiver_config=resampler | {"resampler_head_dim": 16},
        **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    )
    model = drawn(IdeficsModel(config))
    with torch.no_grad():
        for layer in model.gated_cross_attn_layers:
            # As a new one has them, nothing would be seen of an image.
            layer.alpha_cross_attn.fill_(1)
            layer.alpha_dense.fill_(1)
    model.save_pretrained(folder)
    _processor(folder, "IdeficsImageProcessorPil", image_size=SIDE)
    tokenizer.save_pretrained(folder)


def _table(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    tokenizer = word_pieces()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"normalize": false}')
    vectors = np.random.default_rng(0).normal(size=(len(tokenizer), 16)).astype(np.float32)
    save_file({"embeddings": vectors}, folder / "model.safetensors")


def _words(folder: Path) -> None:
    import numpy as np

    words = [*WORDS[:9], "x", "Ein", "Vogel"]
    rows = np.random.default_rng(0).normal(size=(len(words), 8))
    lines = [f"{word} {' '.join(f'{each:.6f}' for each in row)}\n" for word, row in zip(words, rows, strict=True)]
    (folder / "words.txt").write_text("".join(lines))


def _program(folder: Path) -> None:
    """`SIDE` readings of 3 channels to 8 components, of any batch; as torch.export and as TorchScript save it."""
    import torch

    class Gait(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = torch.nn.Conv1d(3, 6, 5), torch.nn.Linear(6, 8)

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.out(torch.tanh(self.conv(windows)).mean(2))
            return found

    model, windows = drawn(Gait()).eval(), torch.zeros(2, 3, SIDE)
    exported = torch.export.export(model, (windows,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, folder / "gait.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(model, windows).save(str(folder / "gait.pt"))


MAKERS: dict[str, Callable[[Path], None]] = {
    "ast": _ast,
    "bert": _bert,
    "clap": _clap,
    "clip": _clip,
    "dinov2": _dinov2,
    "efficientnet": _efficientnet,
    "hubert": _hubert,
    "idefics": _idefics,
    "lxmert": _lxmert,
    "perceiver": _perceiver,
    "program": _program,
    "resnet": _resnet,
    "siglip": _siglip,
    "table": _table,
    "videomae": _videomae,
    "visual-bert": _visual_bert,
    "vit": _vit,
    "wav2vec2": _wav2vec2,
    "whisper": _whisper,
    "xclip": _xclip,
    "words": _words,
}
"""Kind -> what writes its checkpoint into a folder."""


@functools.cache
def checkpoint(kind: str) -> Path:
    """The folder of a checkpoint, made once a process; it is not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix=f"braid-{kind}-"))
    atexit.register(shutil.rmtree, folder)
    MAKERS[kind](folder)
    return folder
