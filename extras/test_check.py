"""What a folder holds, what is wrong with it, and whether it fits into memory."""
import argparse
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import load_weights
from extras import check, parallel, quantize
from extras.check import memory, memory_needed, open_incomplete, problems, summary
from extras.conftest import ROOT, TINY
from load_weights import (INDEX, Checkpoint, InputError, TensorInfo, build_model, by_canonical_name, load, match_tensors,
                          open_checkpoint)

sys.path.insert(0, str(ROOT / "reference"))
import fixtures                                                                                     # noqa: E402
import small_model as ref                                                                           # noqa: E402

SMALL = ref.MODELS["28b"]


@pytest.fixture
def run_check(monkeypatch, capsys):
    """Runs the command: (exit code, stdout, stderr)."""
    def run_check(*args) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["check", *map(str, args)])
        try:
            code = check.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run_check


# ------------------------------------------------------------------------------------------------------ memory
class Said(Exception):
    """Ends loading where the sentence has been said."""


def said(checkpoint: Checkpoint, device: str = "cpu", dtype=None, stages=(), compiled: bool = False) -> str:
    def log(sentence, redraw=False):
        raise Said(sentence)
    with pytest.raises((Said, InputError)) as sentence:
        load(checkpoint, device, dtype, [*stages, memory(checkpoint, device, dtype, log, compiled)])
    return str(sentence.value)


@pytest.fixture
def free(monkeypatch):
    """Nothing may be read, and so many bytes are free on every device."""
    monkeypatch.setattr(load_weights, "mapped_tensor", None)
    return lambda bytes: monkeypatch.setattr(check, "free_memory", lambda device: bytes)


def test_memory_is_announced_before_anything_is_read(free):
    """tiny/ is stored in fp16, which becomes fp32; what is quantised while loading is memory of its own."""
    free(24e9)
    assert said(open_checkpoint(TINY)) == "tiny takes 7.6 MB of memory (24.0 GB are free on cpu), and 2.0 kB a token of context"
    assert said(open_checkpoint(TINY), dtype=torch.bfloat16).endswith("and 1.0 kB a token of context")
    assert "takes 4.3 MB of memory" in said(open_checkpoint(TINY), stages=[quantize.stage("int8")])
    assert said(open_checkpoint(TINY), stages=[parallel.stage(0, 2)]).endswith("and 1.0 kB a token of context")


def test_progress_is_told_while_tensors_pass():
    lines = []
    load(TINY, stages=[memory(open_checkpoint(TINY), "cpu", None, lambda line, redraw=False: lines.append((line, redraw)))])
    assert lines[1:] == [("loading tiny: 35 %", True), ("loading tiny: 70 %", True)] and not lines[0][1]


def test_what_a_cpu_uses_as_it_stands_is_mapped(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in ref.hub_tensors(SMALL).items()}
    checkpoint = open_checkpoint(fixtures.write_folder(tmp_path, tensors, ref.config(SMALL)))
    bf16 = {name: 2 * parameter.numel() for name, parameter in checkpoint.model.named_parameters()}
    routers = sum(size for name, size in bf16.items() if "_moe.gate." in name)
    experts = sum(size for name, size in bf16.items() if "_moe.experts." in name)
    others = sum(bf16.values()) - routers - experts
    assert memory_needed(checkpoint, checkpoint.model, "cpu", None) == (2 * routers, experts + others)
    assert memory_needed(checkpoint, checkpoint.model, "cpu", torch.bfloat16, compiled=True) == (2 * routers + experts, others)
    assert memory_needed(checkpoint, checkpoint.model, "cpu", torch.float32) == (2 * (routers + experts + others), 0)
    assert memory_needed(checkpoint, checkpoint.model, "cuda", None) == (2 * routers + experts + others, 0)


def test_an_int4_copy_is_packed_and_so_its_memory_is_own(tmp_path):
    """Its scales are mapped; what will be compiled is not packed, but then the experts are stacked."""
    quantize.save_quantized(TINY, "int4", tmp_path / "small")
    checkpoint = quantize.open_quantized(tmp_path / "small")
    bytes_of = lambda *words: sum(parameter.nbytes for name, parameter in checkpoint.model.named_parameters()
                                  if parameter.dtype != torch.float32 and all(word in name for word in words))
    own, mapped = memory_needed(checkpoint, checkpoint.model, "cpu", None)
    assert mapped == bytes_of(".scale") > 0
    assert own == sum(parameter.nbytes for parameter in checkpoint.model.parameters()) - mapped
    experts = bytes_of("_moe.experts.")
    assert memory_needed(checkpoint, checkpoint.model, "cpu", None, compiled=True)[1] == bytes_of() - experts > 0


def test_too_large_a_model_is_refused_before_anything_is_read(free):
    free(1000)
    words = said(open_checkpoint(TINY))
    assert "needs 7.6 MB on cpu" in words and "1.0 kB are free" in words and "more memory" in words
    assert "--device cpu" in said(open_checkpoint(TINY), "cuda")


def test_a_shard_is_what_counts_where_processes_share(free):
    """Half a model fits in int8, the whole in int4."""
    free(4e6)
    assert "--quantize int8 would fit" in said(open_checkpoint(TINY), "cuda", stages=[parallel.stage(0, 2)])
    assert "--quantize int4 would fit" in said(open_checkpoint(TINY), "cuda")
    assert "--quantize int4 would fit" in said(open_checkpoint(TINY), "cuda", stages=[quantize.stage("int8")])


@pytest.mark.parametrize("kind, needed", [(None, "58.8 GB"), ("int8", "30.5 GB"), ("int4", "17.2 GB")])
def test_the_28b_needs_what_the_readme_says(tmp_path, kind, needed):
    """On a GPU; a CPU maps it as it is, but for the routers."""
    config, shapes = fixtures.RELEASED["VL-28B-A3B"], ref.hub_shapes(fixtures.REAL_28B)
    stored = by_canonical_name(tmp_path, [TensorInfo(name, tmp_path, [*shape], "BF16") for name, shape in shapes.items()])
    checkpoint = match_tensors(tmp_path, config, build_model(config), stored)
    if kind:
        quantize.quantize_layers(checkpoint.model, kind)
    own, mapped = map(check.format_bytes, memory_needed(checkpoint, checkpoint.model, "cuda", None))
    assert (own, mapped) == (needed, "0.0 kB") and check.bytes_of_a_token(checkpoint, checkpoint.model, None) == 57_344
    own, mapped = map(check.format_bytes, memory_needed(checkpoint, checkpoint.model, "cpu", None))
    assert kind or (own, mapped) == ("35.4 MB", "58.8 GB")


def table(checkpoint: Checkpoint) -> dict[str, str]:
    return {line.split()[1]: line for line in check.memory_table(checkpoint)}


def test_memory_by_precision_and_device(tmp_path):
    """As it is announced before loading. What is quantised already cannot be once more."""
    rows, checkpoint = table(open_incomplete(TINY)), open_checkpoint(TINY)
    assert list(rows) == ["as", "bfloat16", "int8", "int4"]
    assert "7.6 MB on cuda, 7.6 MB and 0.0 kB mapped from disk on cpu; 2.0 kB a token" in rows["as"]
    assert " 1.0 kB a token" in rows["bfloat16"]
    bf16 = memory_needed(checkpoint, checkpoint.model, "cpu", torch.bfloat16)
    assert bf16[1] == 0 and f"{check.format_bytes(bf16[0])} and 0.0 kB mapped" in rows["bfloat16"]
    assert "4.3 MB on cuda" in rows["int8"]
    quantize.save_quantized(TINY, "int8", tmp_path / "small")
    rows = table(open_incomplete(tmp_path / "small"))
    assert list(rows) == ["as", "bfloat16"] and "0.0 kB mapped" not in rows["as"]


def test_memory_is_not_known_while_tensors_are_missing(tmp_path):
    """Nor in int4 where that does not divide the rows."""
    tensors = ref.hub_tensors(SMALL)
    assert list(table(open_incomplete(fixtures.write_folder(tmp_path, tensors, ref.config(SMALL))))) == ["as", "bfloat16", "int8"]
    tensors.pop("model.norm.weight")
    assert list(table(open_incomplete(fixtures.write_folder(tmp_path, tensors, ref.config(SMALL))))) == ["not"]


@pytest.mark.parametrize("args, ways", [
    (dict(), ["--quantize int4", "a shorter prompt"]),
    (dict(media=[("image", "x")], quantize="int4", dtype="float32"), ["--max-pixels", "--dtype bfloat16", "a shorter prompt"]),
])
def test_what_is_left_to_try_when_memory_runs_out(args, ways):
    args = argparse.Namespace(**{"media": [], "prompt": "x", "quantize": None, "dtype": "auto"} | args)
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(10**13)
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    for error, asked in ((on_cpu.value, "40,000.0 GB more"), (on_gpu, "20.00 GiB more"), (MemoryError(), "memory")):
        sentence = check.out_of_memory(error, args)
        assert asked in sentence and sentence.endswith(f": try {' or '.join(ways)}") and "\n" not in sentence


# ---------------------------------------------------------------------------------------------------- the folder
def test_config_and_index_are_enough_for_the_names(run_check, tmp_path):
    names = list(ref.hub_shapes(fixtures.REAL_28B))
    (tmp_path / "config.json").write_text(json.dumps(fixtures.RELEASED["VL-28B-A3B"]))
    index = {name: f"model-{i % 12:05d}.safetensors" for i, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    code, out, err = run_check(tmp_path)
    assert code == 0 and err == ""
    for fact in ("29,399,294,336", "1 dense, 27 sparse", "0 of 12 here", "11,105 stored", "0 missing, 0 unexpected",
                 "not known yet", "as stored 58.8 GB on cuda, 35.4 MB and 58.8 GB mapped from disk on cpu", "int8      30.5 GB",
                 "int4      17.2 GB", "57.3 kB a token", "tokenizer.model is not here"):
        assert fact in out, out


def test_names_of_the_index_are_checked(run_check, tmp_path):
    index = dict.fromkeys(ref.hub_shapes(SMALL), "model-00001.safetensors")
    index["model.embed_token.weight"] = index.pop("model.embed_tokens.weight")
    (tmp_path / "config.json").write_text(json.dumps(ref.config(SMALL)))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    code, out, _ = run_check(tmp_path)
    assert code == 2 and "1 missing, 1 unexpected" in out and "(closest name: embed_tokens.weight)" in out


def test_a_folder_that_is_half_here(run_check, tmp_path):
    """What the files that are here hold must fit; of the others the index tells the names."""
    fixtures.write_folder(tmp_path, ref.hub_tensors(SMALL) | {"model.norm.weight": torch.ones(95)}, ref.config(SMALL), shards=3)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    code, out, _ = run_check(tmp_path)
    assert code == 2 and "2 of 3 here" in out and "F32" in out and "0 missing, 0 unexpected, 1 mismatched" in out
    assert "norm.weight should be (96,)" in out and "(95,)" in out


@pytest.mark.parametrize("dropped, added, expected", [
    ("model.norm.weight", "model.nrom.weight", ["norm.weight (96,) is missing (closest name: model.nrom.weight)",
                                                "model.nrom.weight is not a tensor of this model (closest name: norm.weight)"]),
    ("model.norm.weight", "", ["norm.weight (96,) is missing"]),
    ("", "model.xyz", ["model.xyz is not a tensor of this model"]),
    ("", "", []),
])
def test_problems_name_what_is_closest(tmp_path, dropped, added, expected):
    tensors = ref.hub_tensors(SMALL) | ({added: torch.ones(96)} if added else {})
    tensors.pop(dropped, None)
    assert problems(open_incomplete(fixtures.write_folder(tmp_path, tensors, ref.config(SMALL)))) == expected


def test_only_the_first_problems_are_listed(run_check, tmp_path):
    save_file({"model.norm.weight": torch.ones(96)}, fixtures.write_folder(tmp_path, {}, ref.config(SMALL)) / "model.safetensors")
    code, out, _ = run_check(tmp_path)
    assert code == 2 and out.count(" is missing") == 20 and "1 stored" in out


def test_the_bundled_checkpoint_is_complete(run_check):
    code, out, err = run_check(TINY)
    assert code == 0 and err == "" and "1,895,088" in out and "1 of 1 here, 3,820,784 bytes, F16" in out
    assert "8 text of width 48 + 8 vision of width 32 a layer, 2 chosen, 1 shared" in out and "0 missing" in out


@pytest.mark.parametrize("kind, dtypes", [("int8", "BF16, F16, I8"), ("int4", "BF16, F16, U8")])
def test_a_quantised_folder_has_the_parameters_of_the_original(tmp_path, kind, dtypes):
    quantize.save_quantized(TINY, kind, tmp_path / "small")
    rows = {row.split()[0]: row for row in summary(open_incomplete(tmp_path / "small")).splitlines()}
    assert "1,895,088" in rows["parameters"] and dtypes in rows["files"] and "0 missing, 0 unexpected" in rows["tensors"]


def test_a_hub_id_is_found_in_the_local_cache(run_check, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    ref.write_checkpoint(SMALL, tmp_path / "models--baidu--X" / "snapshots" / "aaa")
    assert run_check("baidu/X")[0] == 0
    code, out, err = run_check("baidu/Y")
    assert code == 2 and out == "" and err.startswith("error: baidu/Y is neither") and err.count("\n") == 1


@pytest.mark.parametrize("breaks, words", [
    (lambda at: (at / "config.json").unlink(), "config.json"),
    (lambda at: (at / INDEX).write_text("[]"), "JSON object"),
    (lambda at: (at / INDEX).write_text('{"weight_map": {"a": "../x"}}'), "weight_map"),
    (lambda at: (at / "model-00002-of-00003.safetensors").write_bytes(b"x"), "damaged"),
    (lambda at: (at / INDEX).write_text('{"weight_map": {"ernie.x": "a.safetensors"}}'), "-PT"),
    (lambda at: (at / "config.json").write_text('{"model_type": "qwen"}'), "qwen"),
    (lambda at: (at / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}'), "awq"),
])
def test_a_damaged_folder_gets_one_sentence_and_exit_2(run_check, tmp_path, breaks, words):
    breaks(fixtures.write_folder(tmp_path, ref.hub_tensors(SMALL), ref.config(SMALL), shards=3))
    code, out, err = run_check(tmp_path)
    assert code == 2 and out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_it_runs_as_a_module(run_check):
    done = subprocess.run([sys.executable, "-m", "extras.check", "tiny"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "281 stored" in done.stdout and done.stderr == ""
    code, out, err = run_check()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
