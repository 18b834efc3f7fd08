"""Files for tests: a small vocabulary, other spellings of a checkpoint, the released models without their weights, and files
that are no images."""
import io
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from small_model import (IMAGE, IMAGE_END, IMAGE_START, VIDEO_END, VIDEO_START, Shapes, image, text_config)


# ------------------------------------------------------------------------------------------------ a small vocabulary
WORDS = "Hello hello how Hey This is a True test User: Assistant: Picture What kind of dog is this? Nice to meet you."
ADDED = ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|LOC_7|>", "<|IMAGE_START|>",
         "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>")


def write_vocabulary(folder: Path, known: tuple[str, ...] = (), added: tuple[str, ...] = ADDED, **generation) -> Path:
    """A tokenizer folder with the real layout of ids: 3 specials, digits from 3, bytes from 13, pieces, and from 1000
    on the control tokens that the folder adds. known: control strings that SentencePiece itself finds in a text.
    generation: what generation_config.json says."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split(), "a Hello"] * 50), model_writer=model, model_type="bpe",
        vocab_size=420, byte_fallback=True, user_defined_symbols=[*"0123456789", *known], add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"additional_special_tokens": [*known, "1"], "cls_token": {"content": "<|begin_of_sentence|>"},
                "padding_side": "Hello", "add_bos_token": True}
    files = {"added_tokens": {name: 1000 + i for i, name in enumerate(added)}, "tokenizer_config": settings,
             "generation_config": generation}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# ------------------------------------------------------------ other spellings of a checkpoint, for tests of the loader
ABSENT = object()                            # of a field of config.json: it is left out


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict, shards: int = 1) -> Path:
    """A checkpoint folder of these tensors, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: x.contiguous() for name, x in tensors.items() if files[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def flat_config(shapes: Shapes, **changes) -> dict:
    """The layout of the released files: everything at the top, lists of one number a modality."""
    first, last, text = shapes.layers.index("sparse"), len(shapes.layers), text_config(shapes)
    copied = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
              "head_dim max_position_embeddings rms_norm_eps moe_k moe_intermediate_size moe_num_shared_experts "
              "tie_word_embeddings")
    return {key: text[key] for key in copied.split()} | {
        "model_type": "ernie4_5_moe_vl", "rope_theta": 500_000, "freq_allocation": 20, "im_patch_id": IMAGE,
        "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END, "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END, "moe_num_experts": [shapes.experts] * 2, "moe_layer_interval": 1,
        "moe_layer_start_index": [first] * 2, "moe_layer_end_index": [last + 1, last], "moe_use_aux_free": True,
        "vision_config": {"depth": shapes.vit_depth, "embed_dim": shapes.vit_width, "hidden_size": shapes.vit_width,
                          "num_heads": shapes.vit_heads, "mlp_ratio": shapes.vit_mlp / shapes.vit_width,
                          "hidden_act": "quick_gelu"}} | changes


def text_alone(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """What a text-only checkpoint has of these tensors. Its routers are not transposed."""
    out = {}
    for name, x in tensors.items():
        number = re.search(r"\.experts\.(\d+)\.", name)
        if re.search(r"vision_model|resampler|weight_1$", name) or number and int(number[1]) >= experts:
            continue
        out[name] = x.T if name.endswith("mlp.gate.weight") else x[:1] if "moe_statics" in name else x
    return out


def in_memory(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The names and shapes of transformers in memory: experts stacked in numeric order, gate rows on top of up rows."""
    out, stacks = {}, {}
    for name, x in tensors.items():
        name = re.sub(r"(?<=linear\.)[023]", lambda child: {"0": "fc1", "2": "fc2", "3": "ln"}[child[0]], name)
        name = re.sub(r"^model\.(?=embed|norm|layers)", "model.language_model.", name)
        name = re.sub("^vision_model", "model.vision_tower", name)
        moe = [name.split(".mlp.")[0] + f".mlp.{kind}_moe." for kind in ("text", "vision")]
        if number := re.search(r"\.experts\.(\d+)\.(\w+)_proj", name):
            kind, e = divmod(int(number[1]), experts)
            stacks.setdefault(moe[kind], {}).setdefault(e, {})[number[2]] = x
        elif "moe_statics" in name:
            out |= {f"{at}gate.moe_statics.e_score_correction_bias": row[None] for at, row in zip(moe, x)}
        elif ".mlp.gate.weight" in name:
            out[f"{moe[name.endswith('_1')]}gate.weight"] = x.T
        else:
            out[name] = x
    for at, stack in stacks.items():
        rows = [stack[e] for e in range(experts)]
        out[f"{at}experts.gate_up_proj"] = torch.stack([torch.cat((row["gate"], row["up"])) for row in rows])
        out[f"{at}experts.down_proj"] = torch.stack([row["down"] for row in rows])
    return out


# A tied model may store a head all the same; mtp: heads that predict several tokens ahead.
HEADS = {"lm_head.weight": torch.ones(72, 96), "model.mtp_block.0.mlp.weight": torch.ones(3)}
SPELLINGS = {  # functions of the tensors as they are on the Hub, and of the number of experts
    "hub": lambda tensors, experts: tensors,
    "save_pretrained": lambda tensors, experts: {re.sub("^vision", "model.vision", at): x for at, x in tensors.items()},
    "in memory": in_memory,
    "with heads": lambda tensors, experts: HEADS | tensors,
}


# --------------------------------------------------------------------------- the released models, without their weights
REAL_28B = Shapes(tie=True, layers=("dense",) + ("sparse",) * 27, shared=2, experts=64, k=6, hidden=2560, heads=20,
                  kv_heads=4, dense=12288, widths=(1536, 512), vocab=103424, vit_depth=32, vit_width=1280, vit_heads=16,
                  vit_mlp=5120)
VISION = dict(depth=32, embed_dim=1280, hidden_size=1280, hidden_act="quick_gelu", mlp_ratio=4, num_heads=16,
              in_channels=3, patch_size=14, spatial_merge_size=2)
COMMON = dict(vocab_size=103424, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500_000,
              hidden_act="silu", use_bias=False)
OF_28B = COMMON | dict(
    hidden_size=2560, intermediate_size=12288, num_hidden_layers=28, num_attention_heads=20, num_key_value_heads=4,
    moe_k=6, moe_num_shared_experts=2, moe_layer_interval=1, tie_word_embeddings=True)
OF_424B = COMMON | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=54, num_attention_heads=64, num_key_value_heads=8,
    moe_k=8, moe_layer_start_index=3, moe_layer_interval=1, tie_word_embeddings=False)
RELEASED = {  # config.json, as far as the model reads it
    "VL-28B-A3B": OF_28B | dict(
        model_type="ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_intermediate_size=[1536, 512],
        moe_layer_start_index=[1, 1], moe_layer_end_index=[29, 28], im_patch_id=100295, image_start_token_id=101304,
        image_end_token_id=101305, video_start_token_id=101306, video_end_token_id=101307, pixel_hidden_size=1280,
        spatial_conv_size=2, temporal_conv_size=2, rope_scaling={"type": "default", "mrope_section": [22, 22, 20]},
        vision_config=VISION),
    "VL-424B-A47B": OF_424B | dict(
        model_type="ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_intermediate_size=[3584, 1536], freq_allocation=20,
        vision_config=VISION),
    "21B-A3B": OF_28B | dict(
        model_type="ernie4_5_moe", moe_num_experts=64, moe_intermediate_size=1536, moe_layer_start_index=1,
        moe_layer_end_index=27),
    "300B-A47B": OF_424B | dict(
        model_type="ernie4_5_moe", moe_num_experts=64, moe_intermediate_size=3584, moe_layer_end_index=53),
    "0.3B": COMMON | dict(
        model_type="ernie4_5", hidden_size=1024, intermediate_size=3072, num_hidden_layers=18, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, tie_word_embeddings=True),
}


SIZES = {  # parameters, dense layers, (layers, experts, chosen, shared, widths, tied) of the released models
    "VL-28B-A3B": (29_399_294_336, 1, (28, 64, 6, 2, (1536, 512), True)),
    "VL-424B-A47B": (423_526_285_184, 3, (54, 64, 8, 0, (3584, 1536), False)),
    "21B-A3B": (21_825_437_888, 1, (28, 64, 6, 2, (1536,), True)),
    "300B-A47B": (299_484_163_264, 3, (54, 64, 8, 0, (3584,), False)),
    "0.3B": (360_748_032, 18, (18, 0, 0, 0, (0,), True)),
}


def write_zeros(shapes: dict[str, tuple], config: dict, folder: Path, shards: int) -> Path:
    """A checkpoint folder of bf16 zeros that take no room: headers, and holes of the right length in sparse files."""
    names, index = list(shapes), {}
    (folder / "config.json").write_text(json.dumps(config))
    for i in range(shards):
        header, end, file = {}, 0, f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            index[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def has_sparse_files(folder: Path) -> bool:
    """Whether a hole in a file takes no room in this folder."""
    with open(folder / "hole", "wb") as file:
        file.truncate(1 << 30)
    blocks = (folder / "hole").stat().st_blocks
    (folder / "hole").unlink()
    return blocks * 512 < 1 << 20


# ------------------------------------------------------------------------------------------- files that are no images
NO_IMAGES = {  # what is wrong with a file -> a word of the sentence that says so
    "missing": "exist", "empty": "pillow", "text": "pillow", "cut": "cut off", "bomb": "pixels", "narrow": "200",
    "float": "bits", "folder": "opened",
}


def write_no_image(case: str, path: Path) -> None:
    """Writes one of NO_IMAGES; what a name promises is not looked at."""
    def stored(one: Image.Image, format: str = "PNG") -> bytes:
        one.save(file := io.BytesIO(), format)
        return file.getvalue()
    whole, huge = stored(image(300, 200)), b"IHDR" + (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    files = {"empty": b"", "text": b"hello", "cut": whole[:2000], "narrow": stored(Image.new("RGB", (2010, 10))),
             "bomb": whole[:12] + huge + zlib.crc32(huge).to_bytes(4, "big") + whole[33:],
             "float": stored(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")}
    if case in files:
        path.write_bytes(files[case])
    if case == "folder":
        path.mkdir()
