"""Trains the bundled checkpoint, with ernie_vl.py as it is, on the images and videos of scenes.py.

    python tiny/train.py --out FOLDER                        from nothing
    python tiny/train.py --out FOLDER --resume               goes on after an interruption
    python tiny/train.py --out FOLDER --device cuda          on a GPU
    torchrun --nproc-per-node 2 tiny/train.py --out FOLDER   on two cores, each with packs of its own

Writes config.json in the nested layout, model.safetensors under the hub's names, the vocabulary, curves.png, and
training.pt, from which --resume goes on. Where there is no training.pt, --resume begins anew from the weights.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import sys
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Iterable

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE)]

from ernie_vl import (Attention, Config, ErnieVL, InputError, Inputs, KVCache, Router, read_json,        # noqa: E402
                      require, token_positions, vision_mask)
from extras.boxes import ZOOM_TOOL                                                    # noqa: E402
from extras.cpu import tune_for_cpu                                                   # noqa: E402
from load_weights import load, read_config, router, source_names                      # noqa: E402
from scenes import (SKILLS, ZOOM_THOUGHT, Example, after_zoom, called_box, encode, example,    # noqa: E402
                    question_of)
from tokenizer import Tokenizer                                                       # noqa: E402

# How often a skill is drawn. What is hard to learn, or is a part of others, comes more often.
SHARES = {"describe": 2, "read": 26, "count": 6, "locate": 5, "compare": 4, "watch": 24, "talk": 3, "think": 4,
          "zoom": 20, "decline": 7, "ask": 4, "told": 3, "clock": 8, "small": 10}
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # as torchrun sets them
# Seeing begins with single things and single letters: at first the shortest of three answers is taken, of fewer skills.
EARLY, EARLY_SHARES = 800, {"describe": 8, "read": 6, "count": 4, "locate": 4, "decline": 4, "talk": 1}
TRAINED = 10**9              # seeds of examples to train on start here; those before are for measuring
FRESH_START = 5 * 10**6      # first step where training begins anew from weights: examples of those before it were seen
PACK = 24                    # conversations in one optimizer step
TOKENS = 600                 # what the loss of a step is divided by; a pack asks for 300 to 1,200 tokens
IMAGE_PIXELS = 18_816, 25_088      # fewest and most: 24 to 32 tokens an image ...
FRAME_PIXELS = 25_088, 28_224      # ... and 15 to 18 a frame
CONTROL = ["<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>",
           "<|VIDEO_START|>", "<|VIDEO_END|>", "<|VIDEO_PLACEHOLDER|>", "<think>", "</think>", "<tool_call>",
           "</tool_call>"]


# ----------------------------------------------------------------------------------------- vocabulary and config
def make_vocabulary(out: Path) -> None:
    """SentencePiece BPE laid out as the real one: 3 specials, 10 digits, 256 bytes, pieces, and then control tokens."""
    corpus = ["User: Picture 1:", "Assistant: ", "Video 1:", "<tool_output> Picture 2:", "</tool_output>"] * 300
    corpus += [json.dumps([ZOOM_TOOL]), "<tool_list>", "</tool_list>"] * 600 + list("ABCDEFGHIJKLMNOPQRSTUVWXYZ") * 40
    corpus += [chr(i) for i in range(33, 127)]
    for skill in SKILLS:
        for seed in range(300):
            it = example(skill, TRAINED + seed)
            corpus += [question_of(it), *(text for _, *turn in it.more for text in turn)]
            corpus += [] if skill in ("read", "zoom") else it.answer.split("\n")
            corpus += ["It says ", ZOOM_THOUGHT, '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [', "]}}"]
    # or its capitals would be joined, in words to be read, too
    corpus = [line for line in corpus if "ERNIE" not in line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=768, byte_fallback=True,
        character_coverage=1.0, user_defined_symbols=list("0123456789"), normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    first = len(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    write_json(out / "added_tokens.json", {name: first + i for i, name in enumerate(CONTROL)})


def make_config(out: Path) -> None:
    vocabulary = read_json(out / "added_tokens.json")
    markers = {"image": "IMAGE_PLACEHOLDER", "video": "VIDEO_PLACEHOLDER", "image_start": "IMAGE_START",
               "image_end": "IMAGE_END", "video_start": "VIDEO_START", "video_end": "VIDEO_END"}
    write_json(out / "config.json", {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_vl_moe",
        **{f"{name}_token_id": vocabulary[f"<|{token}|>"] for name, token in markers.items()},
        "tie_word_embeddings": True, "dtype": "float16",
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text", "vocab_size": 1 + max(vocabulary.values()), "hidden_size": 128,
            "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "use_bias": False, "tie_word_embeddings": True,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "moe_num_experts": 8, "moe_k": 2,
            "moe_intermediate_size": [48, 32], "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]}},
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision", "depth": 6, "hidden_size": 64, "num_heads": 4,
            "intermediate_size": 256, "hidden_act": "quick_gelu", "in_channels": 3, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_merge_size": 2, "rms_norm_eps": 1e-6}})
    write_json(out / "generation_config.json", {"eos_token_id": 2})
    image, frame = ({"size": {"shortest_edge": fewest, "longest_edge": most}}
                    for fewest, most in (IMAGE_PIXELS, FRAME_PIXELS))
    write_json(out / "preprocessor_config.json", image | {"image_processor_type": "Ernie4_5_VLMoeImageProcessor"})
    write_json(out / "video_preprocessor_config.json", frame)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def save(model: ErnieVL, file: Path) -> None:
    """In fp16, under the names of the released files, which the loader's table knows: routers transposed, both biases
    in one tensor."""
    tensors = {}
    for ours, value in model.named_parameters():
        theirs, transform, _ = next(source_names(ours, model.cfg.text.moe_num_experts))
        theirs = theirs if theirs.startswith("vision_model.") else f"model.{theirs}"
        value = value.detach().to("cpu", torch.float16)
        if "correction_bias" in ours:
            value = torch.stack([*tensors.get(theirs, []), value])
        tensors[theirs] = value.T.contiguous() if transform is router else value.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


# -------------------------------------------------------------------------------------------------------- data
class Pack:
    """Conversations behind one another in one sequence, which is one optimizer step."""

    def __init__(self, tokenizer: Tokenizer, cfg: Config, examples: list[tuple[str, Example]]):
        inputs, self.targets, self.lengths = [], [], []
        self.answers = []      # (skill, first token, behind the last)
        for skill, it in examples:
            prompt, ids = encode(tokenizer, it), []
            turns = [(skill, prompt.ids, it.answer)]
            turns += [(name, follow_up(tokenizer, question), answer) for name, question, answer in it.more]
            for name, asked, answer in turns:
                # </s> ends an answer, and <|end_of_sentence|> one that is history
                said = tokenizer.encode(answer, control=True) + [2]
                ids += asked + said[:-1]
                self.targets += [-100] * (len(asked) - 1) + said
                self.answers.append((name, len(self.targets) - len(said), len(self.targets)))
            ids = torch.tensor(ids)
            where = token_positions(ids, prompt.grids, cfg)
            inputs.append(Inputs(ids, where, vision_mask(ids, cfg), prompt.patches, prompt.grids))
            self.lengths.append(len(ids))
        self.inputs = Inputs(*(torch.cat(parts, dim=-1) for parts in list(zip(*inputs))[:3]),
                             torch.cat([i.patches for i in inputs]), [grid for i in inputs for grid in i.grids])
        self.targets = torch.tensor(self.targets)


def follow_up(tokenizer: Tokenizer, question: str) -> list[int]:
    """What stands between an answer and the next, in the form in which answers are asked for."""
    text = f"<|end_of_sentence|>User: {question}\nAssistant: <think>\n\n</think>\n\n"
    return tokenizer.encode(text, control=True)


class Drawn(torch.utils.data.Dataset):
    """Step number -> Pack. No example is seen twice, so what is measured while training is measured on fresh ones."""

    def __init__(self, out: Path, cfg: Config):
        self.out, self.cfg, self.tokenizer = out, cfg, None

    def __getitem__(self, step: int) -> Pack:
        self.tokenizer = self.tokenizer or Tokenizer(self.out)
        rng, early = random.Random(step * WORLD_SIZE + RANK), step < EARLY
        shares = EARLY_SHARES if early else SHARES
        # alike in all processes, so that none waits long for the others
        skills = random.Random(step).choices(list(shares), shares.values(), k=PACK)
        return Pack(self.tokenizer, self.cfg, [draw_example(skill, rng, early) for skill in skills])


def draw_example(skill: str, rng: random.Random, early: bool) -> tuple[str, Example]:
    """The skill that is asked for in the end, and the example."""
    drawn = (example(skill, rng.getrandbits(40) + TRAINED) for _ in range(3 if early else 1))
    it = min(drawn, key=lambda it: len(it.answer))
    if it.truth and rng.random() < 0.7:
        it = after_zoom(it, enlarge(called_box(it), rng))
    return later_turn(it) if it.more and rng.random() < 0.25 else (skill, it)


def enlarge(box: list[int], rng: random.Random) -> list[int]:
    """One side in four of a box a little further out: as a model may call it."""
    return [min(1000, max(0, v + rng.choice([0, 0, 0, more]))) for v, more in zip(box, (-50, -50, 50, 50))]


def later_turn(it: Example) -> tuple[str, Example]:
    """The first question is history now, and the next one is asked."""
    skill, question, answer = it.more[0]
    history = {"role": "assistant", "content": it.answer}, {"role": "user", "content": question}
    return skill, it._replace(messages=[*it.messages, *history], answer=answer, more=())


def packs(out: Path, cfg: Config, first: int, workers: int) -> Iterable[Pack]:
    """For the step `first` and all that follow it."""
    return torch.utils.data.DataLoader(Drawn(out, cfg), batch_size=None, sampler=iter(range(first, 10**9)),
                                       num_workers=workers, prefetch_factor=8 if workers else None)


class PackedAttention(torch.nn.Module):
    """The attention of a pack: each conversation attends to itself alone, as a frame does in the ViT, and a pack costs
    no more than its parts."""

    def __init__(self, attention: Attention, lengths: list[int]):
        super().__init__()
        self.attention, self.lengths = attention, lengths

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        parts = zip(*(z.split(self.lengths) for z in (x, cos, sin)))
        return torch.cat([self.attention(*part, cache) for part in parts])


@contextlib.contextmanager
def packed(model: ErnieVL, lengths: list[int]):
    """Within this, the model computes a pack of conversations of these lengths."""
    attentions = [layer.self_attn for layer in model.layers]
    for layer in model.layers:
        layer.self_attn = PackedAttention(layer.self_attn, lengths)
    try:
        yield
    finally:
        for layer, attention in zip(model.layers, attentions):
            layer.self_attn = attention


def average(tensors: list[torch.Tensor]) -> None:
    """In place, over all processes."""
    if WORLD_SIZE > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, mean in zip(tensors, (flat / WORLD_SIZE).split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))


# ----------------------------------------------------------------------------------------------- balanced routing
class Balance:
    """Keeps all experts in use, for each modality by itself: a bias moved after every step, and two small losses."""

    def __init__(self, model: ErnieVL, bias_rate: float, load: float, orthogonal: float):
        self.bias_rate, self.load, self.orthogonal, self.seen = bias_rate, load, orthogonal, []
        for gate in (module for module in model.modules() if isinstance(module, Router)):
            gate.register_forward_hook(lambda gate, x, out: self.seen.append((gate, x[0], out[1])))

    def loss(self) -> torch.Tensor:
        total = 0.0
        for gate, x, _ in self.seen:
            E, probability = len(gate.weight), probabilities(gate, x)
            share = probability.topk(gate.k).indices.flatten().bincount(minlength=E) / len(x)
            total += self.load * E * (probability.mean(0) * share).sum()             # least when all are used alike
            unit = F.normalize(gate.weight, dim=-1)
            total += self.orthogonal * (unit @ unit.T - torch.eye(E, device=x.device)).square().sum() / E**2
        return total

    @torch.no_grad()
    def step(self) -> None:
        """The bias of an expert that was chosen less often than the average goes up, that of the others down."""
        counts = [chosen.flatten().bincount(minlength=len(gate.weight)).float() for gate, _, chosen in self.seen]
        average(counts)
        for (gate, _, _), count in zip(self.seen, counts):
            gate.e_score_correction_bias += self.bias_rate * (count.mean() - count).sign()
        self.seen.clear()


def probabilities(gate: Router, x: torch.Tensor) -> torch.Tensor:                     # (T, D) -> (T, E)
    """Of all experts, with a gradient: the weights that the router gives them where it chooses all of them."""
    choosing_all = copy.copy(gate)      # with the same weight and bias
    choosing_all.k = len(gate.weight)
    weights, chosen = choosing_all.forward(x)      # no call, which would be counted as one of the model's
    return torch.zeros_like(weights).scatter(-1, chosen, weights)


# ------------------------------------------------------------------------------------------------------ optimizer
class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied (Jordan 2024), scaled to the size of AdamW's
    steps (arXiv:2502.16982). Matrices of one shape go together."""

    def __init__(self, matrices: list, lr: float, momentum: float = 0.95, decay: float = 0.02):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                    shapes[p.shape].append((p, p.grad.lerp(m, group["momentum"])))
            for shape, pairs in shapes.items():
                update = orthogonal(torch.stack([g for _, g in pairs])) * 0.2 * math.sqrt(max(shape)) * group["lr"]
                for (p, _), u in zip(pairs, update):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(u)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: all singular values towards 1, in five steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x.mT if tall else x


def new_model(cfg: Config) -> ErnieVL:
    torch.manual_seed(0)
    model = ErnieVL(cfg)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[1]))
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.05)
    return model


# -------------------------------------------------------------------------------------------------------- training
class Progress:
    """What has been reached, on packs that were never seen before: a line every 50 steps, and the curve."""

    def __init__(self, curve: list[dict], seconds: float):
        self.curve, self.before, self.start, self.tokens = curve, seconds, time.time() - seconds, 0
        self.recent = defaultdict(lambda: deque([0.0], maxlen=200))      # the last 200 answers of a skill: right or not

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    def add(self, pack: Pack, logits: torch.Tensor, loss: float) -> None:
        right = (logits.argmax(-1).cpu() == pack.targets).tolist()
        for skill, begin, end in pack.answers:
            self.recent[skill].append(all(right[begin:end]))             # greedy decoding would write exactly this
        self.recent["loss"].append(loss / sum(end - begin for _, begin, end in pack.answers))
        self.tokens += len(pack.targets)

    def report(self, step: int) -> None:
        mean = {name: sum(self.recent[name]) / len(self.recent[name]) for name in ["loss", *SHARES]}
        self.curve.append({"seconds": self.seconds, "step": step, **mean})
        speed = self.tokens / (self.seconds - self.before)
        skills = "  ".join(f"{name} {100 * mean[name]:.0f}" for name in SHARES)
        print(f"{self.seconds / 60:5.1f} min  step {step:5d}  loss {mean['loss']:.3f}  {speed:5.0f} tokens/s  {skills}",
              flush=True)


class Trainer:
    """A model and its optimizers."""

    def __init__(self, model: ErnieVL, args: argparse.Namespace):
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        is_matrix = lambda name: named[name].ndim == 2 and "embed_tokens" not in name and "gate.weight" not in name
        matrices = [named[name] for name in named if is_matrix(name)]
        others = [named[name] for name in named if not is_matrix(name)]
        self.model, self.trained = model, matrices + others
        self.rates = args.rate, args.rate / 2       # vocabulary, routers and norms learn more slowly
        self.optimizers = [Muon(matrices, self.rates[0]),
                           torch.optim.AdamW(others, self.rates[1], betas=(0.9, 0.95), weight_decay=0.0)]
        self.balance = Balance(model, args.bias, args.load, args.orthogonal)
        self.clock = torch.zeros(1, device=args.device)      # seconds: the mean, so that all processes end together

    def step(self, pack: Pack, scale: float, seconds: float) -> tuple[torch.Tensor, float]:
        """scale: of the learning rates. Returns the logits, and the loss summed over tokens."""
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * scale
        device = self.clock.device
        with packed(self.model, pack.lengths):
            logits = self.model(Inputs(*(x.to(device) for x in pack.inputs[:4]), pack.inputs.grids))
        loss = F.cross_entropy(logits, pack.targets.to(device), reduction="sum")
        # token-balanced: the sum over tokens is divided by a constant, so that a token weighs the same in every step
        (loss / TOKENS + self.balance.loss()).backward()
        for p in self.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad      # an expert that nobody chose has none
        average([*(p.grad for p in self.trained), self.clock.fill_(seconds)])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.balance.step()
        return logits, loss.item()

    def state(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"model": self.model.state_dict(), "optimizers": optimizers}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, its in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(its)


def prepare_folder(out: Path, resume: bool) -> None:
    """Writes vocabulary and config where training begins. Raises InputError where weights would be overwritten."""
    require(resume or not (out / "model.safetensors").exists(),
            f"there are weights in {out}: --resume goes on from them, and --out FOLDER begins anew elsewhere")
    if RANK == 0 and not resume:
        out.mkdir(exist_ok=True)
        make_vocabulary(out)
        make_config(out)
    if WORLD_SIZE > 1:
        dist.barrier()      # the others wait for these files


def go_on(trainer: Trainer, out: Path) -> dict:
    """From training.pt, or else from the weights: how far training has come."""
    if not (out / "training.pt").is_file():
        trainer.model.load_state_dict(load(out).state_dict())
        return {"step": FRESH_START, "seconds": 0.0, "curve": []}
    state = torch.load(out / "training.pt")
    trainer.load_state(state)
    return state


def save_all(trainer: Trainer, progress: Progress, step: int, out: Path) -> None:
    save(trainer.model, out / "model.safetensors")
    reached = {"step": step, "seconds": progress.seconds, "curve": progress.curve}
    torch.save(reached | trainer.state(), out / "training.unfinished")
    os.replace(out / "training.unfinished", out / "training.pt")


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    prepare_folder(out, args.resume)
    cfg = read_config(read_json(out / "config.json"))
    trainer = Trainer(tune_for_cpu(new_model(cfg)).to(args.device), args)
    state = go_on(trainer, out) if args.resume else {"step": 0, "seconds": 0.0, "curve": []}
    progress, first = Progress(state["curve"], state["seconds"]), state["step"]
    trainer.clock.fill_(progress.before)
    for step, pack in enumerate(packs(out, cfg, first, args.workers), first + 1):
        done = step % FRESH_START / args.steps if args.steps else trainer.clock.item() / (60 * args.minutes)
        scale = min(1, step % FRESH_START / 150, max(0.0, (1 - done) / 0.85))      # up, and down to nothing
        progress.add(pack, *trainer.step(pack, scale, progress.seconds))
        if RANK == 0 and (step % 50 == 0 or done >= 1):
            progress.report(step)
        if RANK == 0 and (step % 250 == 0 or done >= 1):
            save_all(trainer, progress, step, out)
        if done >= 1:
            break
    if RANK == 0:
        plot(progress.curve, out / "curves.png")


def plot(curve: list[dict], file: Path) -> None:
    """Accuracy of every skill over minutes, smoothed as the progress line is."""
    left, top, wide, high = 50, 20, 760, 380
    page = Image.new("RGB", (left + wide + 110, top + high + 50), "white")
    draw, font, end = ImageDraw.Draw(page), ImageFont.load_default(13), curve[-1]["seconds"]
    for percent in range(0, 101, 20):
        y = top + high * (1 - percent / 100)
        draw.line((left, y, left + wide, y), "#dddddd")
        draw.text((left - 8, y), f"{percent}", "black", font, anchor="rm")
    for minute in range(0, int(end / 60) + 1, 10 * math.ceil(end / 18_000)):
        draw.text((left + wide * minute * 60 / end, top + high + 14), f"{minute}", "black", font, anchor="mm")
    title = "minutes; right to the letter on images not seen before, %"
    draw.text((left + wide / 2, top + high + 34), title, "black", font, anchor="mm")
    ends = sorted(SHARES, key=lambda skill: -curve[-1][skill])
    for i, skill in enumerate(SHARES):
        colour = f"hsl({360 * i // len(SHARES)}, 75%, {45 if i % 2 else 35}%)"
        line = [(left + wide * row["seconds"] / end, top + high * (1 - row[skill])) for row in curve if skill in row]
        draw.line(line, colour, 2)
        label = f"{skill} {100 * curve[-1][skill]:.0f}"
        draw.text((left + wide + 8, top + 22 * ends.index(skill)), label, colour, font)
    page.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default=str(HERE), help="folder of the checkpoint (default: this one)")
    add("--minutes", type=float, default=240, help="how long, what was before --resume included (default: %(default)s)")
    add("--steps", type=int, help="so many optimizer steps instead of minutes, those before --resume included")
    add("--rate", type=float, default=1.6e-3, help="highest learning rate (default: %(default)s)")
    add("--resume", action="store_true", help="go on from training.pt, or else from the weights")
    add("--device", default="cpu")
    add("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    add("--bias", type=float, default=1e-3, help="step of the routers' bias (default: %(default)s)")
    add("--load", type=float, default=1e-2, help="weight of the load-balancing loss (default: %(default)s)")
    add("--orthogonal", type=float, default=1e-2, help="weight of the routers' orthogonal loss (default: %(default)s)")
    args = parser.parse_args()
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo")
    try:
        train(args)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
