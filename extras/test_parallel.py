"""Several processes, each with its shard, compute what one does."""
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import run
from extras import parallel, quantize
from extras.conftest import EXAMPLE, ROOT, TINY
from load_weights import InputError, load

sys.path.insert(0, str(ROOT / "reference"))
import small_model as ref                                                                           # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ref.write_checkpoint(ref.MODELS["28b"], tmp_path_factory.mktemp("28b"))


def test_a_rank_holds_its_shard(folder):
    whole = load(folder).state_dict()
    shards = [load(folder, stages=[parallel.stage(rank, 2)]).state_dict() for rank in range(2)]
    for name, tensor in whole.items():
        split = name.startswith("layers.") and "_proj" in name
        dim = int(name.endswith(("o_proj.weight", "down_proj.weight")))
        both = torch.cat([shard[name] for shard in shards], dim) if split else shards[1][name]
        assert torch.equal(both, tensor), name


def test_shards_come_before_quantising():
    """Then each rank quantises its own: half as many groups, of its own rows and columns."""
    model = load(TINY, stages=[parallel.stage(1, 2), quantize.stage("int8")])
    whole = load(TINY, stages=[quantize.stage("int8")])
    q, all_q = (m.layers[1].self_attn.q_proj for m in (model, whole))
    assert torch.equal(q.weight, all_q.weight.chunk(2)[1]) and torch.equal(q.scale, all_q.scale.chunk(2)[1])
    with pytest.raises(InputError, match="sharded"):
        load(TINY, stages=[quantize.stage("int8"), parallel.stage(1, 2)])


def test_a_quantised_folder_cannot_be_sharded(tmp_path):
    quantize.save_quantized(TINY, "int8", tmp_path / "small")
    with pytest.raises(InputError, match="original"):
        load(quantize.open_quantized(tmp_path / "small"), stages=[parallel.stage(0, 2)])


@pytest.mark.parametrize("ranks, words", [(3, "num_attention_heads 4"), (4, "num_key_value_heads 2")])
def test_what_cannot_be_divided_is_named(folder, ranks, words):
    with pytest.raises(InputError, match=words):
        load(folder, stages=[parallel.stage(0, ranks)])


def torchrun(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True)


def test_two_processes_answer_as_one_does(ask):
    """Half the heads and half the width of every expert each, over gloo; the first speaks."""
    two = torchrun("run.py", "--image", EXAMPLE)
    assert two.stdout == ask("--image", EXAMPLE)[1] != "" and two.stderr.count("loaded on cpu") == 1


def test_two_processes_compute_the_same_logits_and_draw_the_same_tokens(ask, tmp_path):
    """Without --seed they agree on one, which each writes down before it loads its shard."""
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import pathlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        import run
        load_model = run.load_model
        def writing(args, *others):
            (pathlib.Path(__file__).parent / f"seed-{{run.RANK}}").write_text(str(args.seed))
            return load_model(args, *others)
        run.load_model = writing
        sys.exit(run.main(sys.argv[1:]))""")
    assert torchrun(script, "--image", EXAMPLE, "--save-logits", tmp_path / "two").stdout == ""
    assert ask("--image", EXAMPLE, "--save-logits", tmp_path / "one")[0] == 0
    one, two = (load_file(tmp_path / name)["logits"] for name in ("one", "two"))
    assert (one - two).abs().max() < 3e-5 and one.abs().max() > 10
    first, second = ((tmp_path / f"seed-{rank}").read_text() for rank in range(2))
    assert first == second and first.isdigit()


def test_alone_nothing_is_broadcast():
    assert parallel.broadcast(5) == 5


@pytest.mark.parametrize("seed, kept", [("0", True), (None, False)])
def test_all_ranks_take_one_seed(monkeypatch, seed, kept):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(parallel.atexit, "register", lambda function: None)
    args = run.parse(["--prompt", "x", *(["--seed", seed] if seed else [])])
    assert parallel.join("cpu", args) == "cpu" and (args.seed == 0) == kept and type(args.seed) is int


@pytest.mark.parametrize("device, option, word", [("mps", (), "--device cpu"), ("cpu", ("--compile",), "--compile")])
def test_what_cannot_be_shared_is_refused(device, option, word):
    with pytest.raises(InputError, match=word):
        parallel.join(device, run.parse(["--prompt", "x", *option]))
