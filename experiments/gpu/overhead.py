"""What watching costs on a GPU, beside Transformer Engine's own debug statistics.

A SwiGLU feed-forward of Llama-7B's shape (4096 → 11008, BF16), forward and backward. Works are ten
steps each, so that what happens every tenth step is in every one of them, and take turns with the
unwatched step of the same kind in one process: a plain torch feed-forward, and te.LayerNormMLP in
BF16 and under delayed scaling. TE's features log the tensors that `watch` records: gate and up
(fc1's output), the product (fc2's activation), fc2's output; LogTensorStats all its statistics but
the blockwise one, and in FP8 LogFp8TensorStats of the product.

What waits for the device is counted by torch itself (`set_sync_debug_mode`), inside forward and
backward and at the step's end apart.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import engine
import torch
from suite import Page, Setting, Table, Work, last_line, ratios
from torch import nn

import fp8lab
from fp8lab import GatedFeedForward

TITLE = "What watching costs, beside Transformer Engine's debug statistics"
STEPS = 10  # of one work
EVERY_TENTH, EVERY = "every 10 steps", "every step"
GOALS = {EVERY: "≤ 1.03", EVERY_TENTH: "≤ 1.005"}
COLUMNS = "who", "median", "middle half", "goal"


def run(setting: Setting, page: Page) -> None:
    """The tables of this part."""
    width, hidden = setting.pick((4096, 11008), (32, 48))
    for tokens in setting.pick((8192, 4096), (24,)):
        title = f"{width} → {hidden}, BF16, {tokens} tokens, {STEPS} steps: watched / unwatched"
        table = page.table(f"{title}; torch", *COLUMNS)
        with ExitStack() as stack:
            torch_works(setting, table, stack, width, hidden, tokens)
    syncs(setting, page, width, hidden)
    if "transformer_engine" in setting.missing:
        page.note("transformer_engine is missing here: no figure of its statistics.")
        return
    te = engine.load(setting.rehearsal)
    delayed = engine.recipes().DelayedScaling(amax_history_len=16)
    for name, recipe in (("BF16", None), ("FP8, delayed scaling", delayed)):
        tokens = setting.pick(8192, 24)
        title = f"te.LayerNormMLP, {name}, {width} → {hidden}, {tokens} tokens: watched / unwatched"
        table = page.table(title, *COLUMNS)
        with ExitStack() as stack:
            te_works(setting, table, stack, te, recipe, (width, hidden, tokens))


class Training:
    """Steps of one feed-forward: forward and backward, no optimizer."""

    def __init__(self, setting: Setting, model: nn.Module, width: int, tokens: int) -> None:
        self.model = model
        self.x = torch.randn(tokens, width, device=setting.device).bfloat16().requires_grad_()
        self.region: Any = contextlib.nullcontext

    def twin(self) -> Training:
        """Another module with the same parameters and input: where tensors lie in memory is not to
        be taken for a cost."""
        twin = copy.copy(self)
        same = {id(parameter): parameter for parameter in self.model.parameters()}
        twin.model = copy.deepcopy(self.model, same)
        return twin

    def step(self) -> torch.Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        self.x.grad = None
        with self.region():
            output = self.model(self.x)
        loss = output.float().square().mean()
        loss.backward()
        return loss

    def steps(self) -> None:
        for _ in range(STEPS):
            self.step()


def watched(training: Training, stack: ExitStack, **options: Any) -> Work:
    """Ten steps of a training that is watched into a folder that is gone in the end."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    watch = stack.enter_context(fp8lab.watch(training.model, folder / "run", **options))
    numbers = itertools.count()

    def work() -> None:
        for _ in range(STEPS):
            loss = training.step()
            watch.step(next(numbers), loss=loss)

    return work


def rows(setting: Setting, table: Table, works: dict[str, Work], plain: Work) -> None:
    """A row for each work; one that fails says why, and the others are timed."""
    alive = {}
    for name, work in works.items():
        try:
            work()
        except TimeoutError:
            raise
        except Exception as error:
            table.add(name, f"no result: {last_line(error)}")
        else:
            alive[name] = work
    for name, found in ratios(setting, alive, plain, setting.pick(21, 2)).items():
        low, median, high = found
        goal = next((GOALS[g] for g in GOALS if name.startswith("fp8lab") and g in name), "")
        table.add(name, f"{median:.4f}", f"{low:.4f}–{high:.4f}", goal)


def torch_works(
    setting: Setting, table: Table, stack: ExitStack, width: int, hidden: int, tokens: int
) -> None:
    """fp8lab on a plain torch feed-forward."""
    model = nn.Sequential(GatedFeedForward(width, hidden)).bfloat16().to(setting.device)
    plain = Training(setting, model, width, tokens)
    works: dict[str, Work] = {"nothing (noise)": plain.twin().steps}
    works[f"fp8lab, {EVERY}"] = watched(plain.twin(), stack, every=1)
    works[f"fp8lab, {EVERY_TENTH}"] = watched(plain.twin(), stack, every=10)
    rows(setting, table, works, plain.steps)


def te_works(
    setting: Setting,
    table: Table,
    stack: ExitStack,
    te: Any,
    recipe: Any,
    sizes: tuple[int, int, int],
) -> None:
    """fp8lab and TE's debug statistics on TE's fused feed-forward."""
    width, hidden, tokens = sizes
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engine.fresh()
    try:
        api = stack.enter_context(engine.debugging(features(recipe is not None), folder))
    except ImportError as error:
        table.add("TE's debug statistics", f"no result: {last_line(error)}")
        api = None

    def training(name: str) -> Training:
        torch.manual_seed(0)
        layer = te.LayerNormMLP(
            *(width, hidden),
            activation="swiglu",
            normalization="RMSNorm",
            bias=False,
            params_dtype=torch.bfloat16,
            device=setting.device,
            name=name,
        )
        made = Training(setting, nn.Sequential(layer), width, tokens)
        if recipe is not None:
            made.region = lambda: te.autocast(enabled=True, recipe=recipe)
        return made

    def logged(name: str) -> Work:
        made = training(name)

        def work() -> None:
            for _ in range(STEPS):
                made.step()
                api.step()

        return work

    plain = training("plain")
    works: dict[str, Work] = {"nothing (noise)": training("twin").steps}
    for words, every in ((EVERY, 1), (EVERY_TENTH, STEPS)):
        works[f"fp8lab, {words}"] = watched(training(f"ours{every}"), stack, every=every)
        if api is not None:
            works[f"TE's debug statistics, {words}"] = logged(f"logged{every}_")
    rows(setting, table, works, plain.steps)


def features(fp8: bool) -> str:
    """The YAML of TE's features, for layers called logged1_ and logged10_."""
    stats = "[min, max, mean, std, l1_norm, l2_norm, cur_amax, dynamic_range]"
    of_fp8 = "['underflows%', scale_inv_min, scale_inv_max, mse]"
    text = ""
    for every in (1, STEPS):
        for part, tensors in (("fc1", "output"), ("fc2", "activation, output")):
            text += (
                f"{part}_every_{every}:\n  enabled: True\n"
                f"  layers: {{layer_name_regex_pattern: 'logged{every}_.{part}'}}\n"
                "  transformer_engine:\n"
                f"    LogTensorStats: {{enabled: True, tensors: [{tensors}], stats: {stats}, "
                f"freq: {every}}}\n"
            )
            if fp8 and part == "fc2":
                text += (
                    f"    LogFp8TensorStats: {{enabled: True, tensors: [activation], "
                    f"stats: {of_fp8}, freq: {every}}}\n"
                )
    return text


def syncs(setting: Setting, page: Page, width: int, hidden: int) -> None:
    """How often the host waits for the device in a watched step."""
    table = page.table(
        "Host waits for the device, as torch counts them, in a step that is recorded in full",
        *("where", "unwatched", "watched"),
    )
    model = nn.Sequential(GatedFeedForward(width, hidden)).bfloat16().to(setting.device)
    training = Training(setting, model, width, setting.pick(1024, 24))
    counts: dict[str, list[int]] = {"forward and backward": [], "watch.step": [0]}
    training.step()
    with counting(setting) as said:
        training.step()
    counts["forward and backward"].append(len(said))
    with tempfile.TemporaryDirectory() as folder:
        with fp8lab.watch(model, Path(folder) / "run", every=1, flush_seconds=600.0) as watch:
            for step in range(3):  # in the first the sites are proved, which waits
                with counting(setting) as inside:
                    loss = training.step()
                with counting(setting) as ending:
                    watch.step(step, loss=loss)
    counts["forward and backward"].append(len(inside))
    counts["watch.step"].append(len(ending))
    for name, numbers in counts.items():
        table.add(name, *numbers)
    for line in sorted({*inside})[:3]:
        page.note(f"inside: {line[:200]}")


@contextlib.contextmanager
def counting(setting: Setting) -> Iterator[list[str]]:
    """What torch warns of while it looks for synchronising calls."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not setting.rehearsal:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            if not setting.rehearsal:
                torch.cuda.set_sync_debug_mode("default")
    said += [str(w.message) for w in caught if "synchronizing" in str(w.message)]
