"""Quantising while loading, and quantised folders."""
import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from extras import quantize
from extras.conftest import EXAMPLE, ROOT, TINY
from extras.quantize import GROUPS, QuantizedLinear, open_quantized, save_quantized
from load_weights import InputError, load
from tokenizer import Tokenizer, chat_template, encode_chat, load_image

sys.path[:0] = [str(ROOT / "reference"), str(ROOT / "tiny")]
import scenes                                                                                       # noqa: E402
import small_model as ref                                                                           # noqa: E402
import train                                                                                        # noqa: E402

torch.set_grad_enabled(False)


def distance(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.float() - b.float()).abs().max())


def quantized_layer(kind: str, weight: torch.Tensor) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer, and what its weights stand for, computed from the numbers by hand."""
    rows, columns = weight.shape
    layer = QuantizedLinear(columns, rows, kind)
    numbers, scale = layer.quantize(weight)
    layer.load_state_dict({"weight": numbers, "scale": scale}, assign=True)
    if kind == "int8":
        return layer, numbers.float() * scale.float()[:, None]
    pairs = torch.stack((numbers % 16, numbers // 16), -1).view(rows, len(scale), -1).float()
    scale, offset = scale.float().transpose(0, 1)[..., None].unbind(-2)
    return layer, ((pairs - 8) * scale + offset).view(rows, columns)


@pytest.mark.parametrize("kind, columns", [("int8", 96), ("int8", 48), ("int4", 256), ("int4", 64), ("int4", 96), ("int4", 48)])
def test_weights_are_rounded_to_the_nearest_number_they_can_be(kind, columns):
    """Groups of 128, 64, 32 and 16: half a step, and for int4 what bf16 loses of scale and offset."""
    weight = torch.randn(32, columns, generator=torch.manual_seed(0)) * 0.1 + 0.05
    layer, found = quantized_layer(kind, weight)
    group = columns if kind == "int8" else next(g for g in GROUPS if columns % g == 0)
    parts = weight.view(32, -1, group)
    reach = parts.abs().amax(-1) if kind == "int8" else parts.amax(-1) - parts.amin(-1)
    step, lost = (reach / 127, 0) if kind == "int8" else (reach / 15, (reach + parts.abs().amax(-1)) / 2**9)
    error = (found - weight).view(32, -1, group).abs()
    assert (error <= (0.502 * step + lost)[..., None]).all() and error.max() > 0.4 * step.min()
    assert layer.weight.nbytes == 32 * columns // (1 if kind == "int8" else 2)
    assert layer.scale.nbytes == 2 * 32 if kind == "int8" else 4 * 32 * columns // group
    assert distance(layer.dequantized(layer.weight, layer.scale), found) < 0.01


def test_the_lowest_and_highest_weight_of_an_int4_group_come_back():
    weight = torch.rand(4, 64, generator=torch.manual_seed(0))
    weight[:, 0], weight[:, 1] = 0, 1
    _, found = quantized_layer("int4", weight)
    assert distance(found[:, :2], weight[:, :2]) < 1 / 256


@pytest.mark.parametrize("kind, columns", [("int8", 96), ("int4", 256), ("int4", 48)])
def test_every_kernel_computes_the_product(kind, columns):
    """Of the numbers in bf16: with weights written out or packed for the CPU (int4, but no groups of 16), and of one row."""
    layer, found = quantized_layer(kind, torch.randn(32, columns, generator=torch.manual_seed(0)) * 0.1)
    packed = copy.deepcopy(layer)
    packed.pack()
    assert packed.packed == (columns == 256) and packed.weight.shape == layer.weight.shape
    for rows in (1, 5):
        x = torch.randn(rows, columns, generator=torch.manual_seed(1))
        exact = x.bfloat16().float() @ found.T
        products = [layer(x), packed(x)] + [quantize.matvec(found, x)] * (rows == 1)
        assert all(distance(product, exact) < 0.02 * exact.abs().max() for product in products)
        assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x).dtype == torch.float32


@pytest.fixture(scope="module")
def exact():
    return load(TINY)


@pytest.mark.parametrize("kind, error, saved", [("int8", 0.01, 0.95), ("int4", 0.1, 1.2)])
def test_a_quantised_copy_is_what_quantising_while_loading_gives(tmp_path, monkeypatch, exact, kind, error, saved):
    """And it is close to the checkpoint: the error is the logits' mean one, in parts of their mean size, over the tokens of
    four true answers, which alone are trained; measured 0.007 and 0.075.
    saved: bytes of the two that each weight of the decoder takes in the checkpoint. The copy has several files."""
    monkeypatch.setattr(quantize, "SHARD", 500_000)
    save_quantized(TINY, kind, tmp_path / "small")
    now, copied = load(TINY, stages=[quantize.stage(kind)]), load(open_quantized(tmp_path / "small"))
    for name, tensor in now.state_dict().items():
        assert torch.equal(copied.state_dict()[name], tensor), name
    layers = [module for module in now.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == sum(isinstance(module, nn.Linear) for module in exact.layers.modules())
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    examples = [("describe", scenes.example("describe", seed)._replace(more=())) for seed in range(4)]
    packs = [train.Pack(Tokenizer(TINY), exact.cfg, [example]) for example in examples]
    logits, rounded = (torch.cat([model(pack.inputs)[pack.targets >= 0] for pack in packs]) for model in (exact, now))
    assert error / 3 < (rounded - logits).abs().mean() / logits.abs().mean() < error
    weights = sum(linear.weight.numel() for linear in exact.layers.modules() if isinstance(linear, nn.Linear))
    size = lambda folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size(tmp_path / "small") < size(TINY) - saved * weights
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 900_000
    names = [name for file in files for name in safe_open(file, "pt").keys()]
    assert sorted(names) == sorted(name for name, _ in now.named_parameters())


def test_a_quantised_copy_has_every_other_file_and_is_read_by_whom_the_original_is(tmp_path):
    """The chat template among them, from which the tokenizer tells a Thinking checkpoint."""
    folder = shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.pt", "*.py", "__pycache__"))
    (folder / "chat_template.jinja").write_text("{% if thinking_mode %}<think>{% endif %}")
    (folder / "odd.bin").write_text("weights of another kind")
    folder.chmod(0o755)
    save_quantized(folder, "int8", tmp_path / "small")
    assert (tmp_path / "small").stat().st_mode == folder.stat().st_mode
    for file in {file.name for file in folder.iterdir()} - {"config.json", "model.safetensors", "odd.bin"}:
        assert (tmp_path / "small" / file).read_bytes() == (folder / file).read_bytes(), file
    assert not (tmp_path / "small" / "odd.bin").exists()
    one, two = Tokenizer(folder), Tokenizer(tmp_path / "small")
    assert chat_template(one) == chat_template(two) != chat_template(Tokenizer(TINY))
    question = [{"role": "user", "content": ["Describe this image.", load_image(EXAMPLE, TINY)]}]
    assert encode_chat(one, question).ids == encode_chat(two, question).ids


def test_a_quantised_folder_answers_on_the_command_line(ask, tmp_path):
    save_quantized(TINY, "int4", tmp_path / "small")
    code, answer, _ = ask("--image", EXAMPLE, "--model", tmp_path / "small")
    assert code == 0 and answer == ask("--image", EXAMPLE, "--quantize", "int4")[1] != ""
    code, answer, said = ask("--image", EXAMPLE, "--model", tmp_path / "small", "--quantize", "int4")
    assert code == 2 and answer == "" and "quantised already" in said


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "extras.quantize", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_a_copy_and_says_how_far_it_is(tmp_path):
    done = command(TINY, "int4", "--save", tmp_path / "small")
    assert done.returncode == 0 and done.stdout == "" and "456 of 456 tensors" in done.stderr
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"] == {"quant_method": "int4"}
    again = command(tmp_path / "small", "int4", "--save", tmp_path / "smaller")
    assert again.returncode == 2 and "quantised already" in again.stderr and again.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_ctrl_c_leaves_nothing(tmp_path):
    stopped = """if True:
        import os, runpy, safetensors.torch, signal, sys
        safetensors.torch.save_file = lambda *args, **options: os.kill(os.getpid(), signal.SIGINT)
        runpy.run_module("extras.quantize", run_name="__main__")"""
    out = subprocess.run([sys.executable, "-c", stopped, TINY, "int4", "--save", tmp_path / "small"], cwd=ROOT,
                         capture_output=True, text=True)
    assert out.returncode == 130 and out.stderr == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [(), (TINY, "int4"), (TINY, "int5", "--save", "x"), ("nowhere", "int4", "--save", "x"),
                                  (TINY, "int4", "--save", TINY), (TINY, "int4", "--save", TINY / "no" / "where")])
def test_bad_arguments_get_one_sentence_and_exit_2(args, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quantize", *map(str, args)])
    try:
        code = quantize.main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_what_cannot_be_quantised_is_refused(tmp_path, monkeypatch):
    folder = ref.write_checkpoint(ref.MODELS["28b"], tmp_path / "28b")
    with pytest.raises(InputError, match="groups of 16"):
        load(folder, stages=[quantize.stage("int4")])
    with pytest.raises(InputError, match="already"):
        load(folder, stages=[quantize.stage("int8"), quantize.stage("int8")])
    for method in ({"quant_method": "gptq"}, "gptq"):
        (folder / "config.json").write_text(json.dumps(ref.config(ref.MODELS["28b"]) | {"quantization_config": method}))
        with pytest.raises(InputError, match="gptq"):
            open_quantized(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="1,000 are free"):
        save_quantized(TINY, "int8", tmp_path / "small")
    assert not (tmp_path / "small").exists()
