"""Hugging Face's own Trainer trains a tiny Llama, watched by one line.

The oracle for what is recorded is what Trainer itself logs at every step: the losses are equal, to
the bit. The oracle for changing nothing is the same training unwatched. Every test trains for real,
with gradient accumulation, and with evaluations in between.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fp8lab
from fp8lab.ffn import GatedFeedForward
from fp8lab.integrations.transformers import WatchCallback
from fp8lab.store import RunError

ACCUMULATED, BATCH, TOKENS, HIDDEN = 3, 2, 12, 40


class Text(Dataset):
    """Sequences of random tokens; of each a different number counts towards the loss."""

    def __init__(self, size: int = 80) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[: index % 7] = -100
        return {"input_ids": tokens, "labels": labels}


class Mean(nn.Module):
    """No Llama: it takes no number of items, so Trainer averages its losses."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.returns = returns
        self.embedding = nn.Embedding(64, 16)
        self.mlp = GatedFeedForward(16, HIDDEN)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.mlp(self.embedding(input_ids)))
        if labels is None:
            return (logits,) if self.returns == "tuple" else {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (loss, logits) if self.returns == "tuple" else {"loss": loss, "logits": logits}


class Stop(TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.error


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            attention_dropout=0.1,
        )
    )


def trainer(
    path: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 8,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    own_loss = options.pop("compute_loss_func", None)
    return Trainer(
        llama() if model is None else model,
        TrainingArguments(**(arguments | options)),
        train_dataset=Text(),
        eval_dataset=Text(4),
        callbacks=list(callbacks),
        compute_loss_func=own_loss,
    )


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def in_process(*arguments: str, returns: int) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == returns, done.stderr
    return done.stdout


def hooks_of(trainer: Trainer) -> list[Any]:
    owners = [(module, "_forward_hooks") for module in trainer.model.modules()]
    owners += [(module, "_forward_pre_hooks") for module in trainer.model.modules()]
    inner = trainer.optimizer.optimizer
    owners += [(inner, "_optimizer_step_pre_hooks"), (inner, "_optimizer_step_post_hooks")]
    return [hook for owner, name in owners for hook in getattr(owner, name).values()]


# --- what is recorded ---------------------------------------------------------------------------


def test_watching_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    states, evaluations = [], []
    for callbacks in ([WatchCallback(tmp_path / "run", every=3)], []):
        one = trainer(tmp_path, *callbacks, max_steps=20)
        one.train()
        assert hooks_of(one) == []
        optimizer = one.optimizer.state_dict()["state"]
        states.append(
            dict(one.model.named_parameters())
            | {f"{i} {name}": s for i, p in optimizer.items() for name, s in p.items()}
        )
        evaluations.append(logged(one, "eval_loss"))
    assert evaluations[0] == evaluations[1]
    assert len(evaluations[0]) == 7
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_rows_are_those_of_the_training(tmp_path: Path) -> None:
    told: list[int] = []
    callback = WatchCallback(
        tmp_path / "run", every=2, listeners=[lambda step, scalars: told.append(step)]
    )
    watched = trainer(tmp_path, callback, max_grad_norm=0.0)
    watched.train()
    assert told == [0, 2, 4, 6]
    run = fp8lab.open_run(tmp_path / "run")
    steps = run.steps()
    assert run.state == "finished"
    assert steps["step"].tolist() == list(range(8))
    assert steps["loss"].tolist() == logged(watched, "loss")
    assert steps["learning_rate"].tolist() == logged(watched, "learning_rate")
    # Trainer's norm is in float32.
    assert steps["grad_norm"].tolist() == pytest.approx(logged(watched, "grad_norm"), rel=1e-6)
    product = run.tensors().query("site == 'model.layers.1.mlp:product'")
    # Every micro-batch is counted, once, and no evaluation.
    elements = float(ACCUMULATED * BATCH * TOKENS * HIDDEN)
    assert product["count"].dropna().tolist() == [elements] * 4
    assert product["step"].tolist() == list(range(8))


@pytest.mark.parametrize("returns", ["dict", "tuple"])
def test_a_mean_over_each_micro_batch_is_averaged(returns: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # 80 sequences are 40 micro-batches: the epoch ends with a step of one instead of three.
    watched = trainer(tmp_path, WatchCallback(tmp_path / "run"), model=Mean(returns), max_steps=15)
    watched.train()
    steps = fp8lab.open_run(tmp_path / "run").steps()
    assert steps["loss"].tolist() == logged(watched, "loss")


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs["logits"]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (llama, {"label_smoothing_factor": 0.1}),
        (lambda: Mean("dict"), {"compute_loss_func": own_loss}),
        (lambda: Mean("tuple"), {"compute_loss_func": own_loss}),
    ],
)
def test_a_loss_that_is_not_the_models_is_missing(
    model: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    callback = WatchCallback(tmp_path / "run")
    trainer(tmp_path, callback, model=model(), max_steps=2, **options).train()
    assert fp8lab.open_run(tmp_path / "run").steps()["loss"].isna().tolist() == [True, True]


class Scores:
    """An output of its own kind, as the models of other libraries have."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("wrapped", [Scores, lambda logits: logits.sum()])
def test_a_model_that_returns_something_else_trains(wrapped: Any, tmp_path: Path) -> None:
    class Other(Mean):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return wrapped(super().forward(input_ids)["logits"])

    class Own(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
            output = model(**inputs)
            return getattr(output, "logits", output).square().mean()

    arguments = trainer(tmp_path, max_steps=2, eval_strategy="no").args
    callback = WatchCallback(tmp_path / "run")
    Own(Other("dict"), arguments, train_dataset=Text(), callbacks=[callback]).train()
    assert fp8lab.open_run(tmp_path / "run").steps()["loss"].isna().tolist() == [True, True]


TWO = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_integration_transformers import WatchCallback, logged, trainer
path = Path({path!r})
watched = trainer(path, WatchCallback(path / "run"), max_steps=3)
watched.train()
if watched.args.process_index == 0:
    (path / "logged").write_text(json.dumps(logged(watched, "loss")))
"""


@pytest.mark.long
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO.format(path=str(tmp_path), tests=str(Path(__file__).parent)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    in_process("-W", "ignore", *launch, returns=0)
    steps = fp8lab.open_run(tmp_path / "run").steps()
    assert steps["rank"].tolist() == [0, 1] * 3
    # Trainer logs the mean over the processes, of which each has weighted its tokens among all.
    logged = json.loads((tmp_path / "logged").read_text())
    assert steps.groupby("step")["loss"].mean().tolist() == pytest.approx(logged, rel=1e-6)
    assert steps.groupby("step")["grad_norm"].nunique().tolist() == [1, 1, 1]


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.long
def test_a_resumed_training_goes_on_in_the_same_run(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = WatchCallback(tmp_path / "whole", every=2)
    trainer(tmp_path / "a", whole, **options).train()

    with pytest.raises(OSError, match="unplugged"), WatchCallback(tmp_path / "run") as callback:
        trainer(tmp_path / "b", Stop(6, OSError("unplugged")), callback, **options).train()
    failed = fp8lab.open_run(tmp_path / "run")
    error, _, place = failed.info["error"].partition(" (")
    assert (failed.state, error) == ("failed", "OSError: unplugged")
    assert place.startswith("test_integration_transformers.py:")
    assert failed.steps()["step"].tolist() == [0, 1, 2, 3, 4]

    goes_on = WatchCallback(tmp_path / "run", every=2)
    trainer(tmp_path / "b", goes_on, **options).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4")
    )
    run, expected = fp8lab.open_run(tmp_path / "run"), fp8lab.open_run(tmp_path / "whole")
    assert run.state == "finished"
    told = [[3, "checkpoint"], [4, "resumed"], [7, "checkpoint"]]
    assert run.events()[["step", "kind"]].values.tolist() == told
    resumed = run.tensors().query("step >= 4").reset_index(drop=True)
    whole_rows = expected.tensors().query("step >= 4").reset_index(drop=True)
    for site in ("model.layers.0.mlp:product", "model.layers.1.mlp:gate"):
        for column in ("cur_amax", "count", "std", "kurtosis"):
            one = resumed.loc[resumed["site"] == site, column]
            pd.testing.assert_series_equal(one, whole_rows.loc[whole_rows["site"] == site, column])
    numbers = ["step", "loss", "learning_rate", "grad_norm"]
    pd.testing.assert_frame_equal(run.steps()[numbers], expected.steps()[numbers])


@pytest.mark.long
def test_resuming_what_was_not_watched_begins_a_run(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, max_steps=4, **options).train()
    callback = WatchCallback(tmp_path / "run")
    resumed = trainer(tmp_path, callback, max_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert fp8lab.open_run(tmp_path / "run").steps()["step"].tolist() == [4, 5]


def test_rows_before_a_checkpoint_are_on_disk(tmp_path: Path) -> None:
    callback = WatchCallback(tmp_path / "run", flush_seconds=1e9)
    steps_on_disk: list[int] = []

    class Read(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps_on_disk.extend(fp8lab.open_run(tmp_path / "run").steps()["step"])

    trainer(tmp_path, callback, Read(), max_steps=3, save_strategy="steps", save_steps=3).train()
    assert steps_on_disk == [0, 1, 2]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    trainer(tmp_path, WatchCallback(tmp_path / "run"), max_steps=2).train()
    for callback in (WatchCallback(tmp_path / "run"), WatchCallback(tmp_path / "run")):
        again = trainer(tmp_path, callback, max_steps=2)
        with pytest.raises(RunError, match="exists already"):
            again.train()
        assert again.state.global_step == 0
        assert hooks_of(again) == []
    assert len(fp8lab.open_run(tmp_path / "run").steps()) == 2


def test_a_batch_size_that_does_not_fit_is_tried_again_in_the_same_run(tmp_path: Path) -> None:
    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.train_batch_size == BATCH and state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")

    watched = trainer(
        tmp_path, WatchCallback(tmp_path / "run"), OutOfMemory(), auto_find_batch_size=True
    )
    watched.train()
    assert watched.state.train_batch_size < BATCH
    run = fp8lab.open_run(tmp_path / "run")
    assert run.state == "finished"
    assert run.steps()["loss"].tolist() == logged(watched, "loss")[-8:]


# --- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state"), [(OSError("x"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_the_with_form_closes_at_once(error: BaseException, state: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), WatchCallback(tmp_path / "run") as callback:
        stopped = trainer(tmp_path, callback, Stop(2, error))
        stopped.train()
    run = fp8lab.open_run(tmp_path / "run")
    assert run.state == state
    assert run.steps()["step"].tolist() == [0, 1]
    assert hooks_of(stopped) == []


@pytest.mark.parametrize(
    ("last", "state", "error"),
    [
        (ValueError("shapes"), "failed", "ValueError: shapes"),
        (KeyboardInterrupt(), "interrupted", None),
        (None, "failed", "SystemExit: the process ended before the training did"),
    ],
)
def test_a_callback_that_is_gone_closes_its_run(
    last: BaseException | None,
    state: str,
    error: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "last_value", last, raising=False)
    stopped = trainer(tmp_path, WatchCallback(tmp_path / "run"), Stop(2, OSError("caught")))
    try:
        stopped.train()
    except OSError:
        pass
    assert fp8lab.open_run(tmp_path / "run").state == "running"
    del stopped
    gc.collect()
    run = fp8lab.open_run(tmp_path / "run")
    assert (run.state, run.info.get("error")) == (state, error)


DIES = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_integration_transformers import Stop, WatchCallback, trainer
path = Path({path!r})
class Fork(Stop):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.fork() == 0:
            sys.exit()  # a child that runs its exit handlers, in the middle of the training
        if state.global_step == 2:
            os.wait()
            print(Path({path!r}, "run", "run.json").read_text(), flush=True)
trainer(path, WatchCallback(path / "run"), Fork(2, None), Stop(3, OSError("disk"))).train()
"""


@pytest.mark.long
def test_a_process_that_dies_of_an_exception_closes_its_run(tmp_path: Path) -> None:
    code = DIES.format(path=str(tmp_path), tests=str(Path(__file__).parent))
    died = in_process("-W", "ignore", "-c", code, returns=1)
    assert '"state": "running"' in died  # the child's end is not the training's
    run = fp8lab.open_run(tmp_path / "run")
    assert run.state == "failed" and run.info["error"].startswith("OSError: disk (test_integration")
    assert run.steps()["step"].tolist() == [0, 1, 2]


# --- refusals -----------------------------------------------------------------------------------


def test_an_unknown_option_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evry"):
        WatchCallback(tmp_path / "run", evry=3)


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    watched = trainer(tmp_path, WatchCallback(tmp_path / "run"))
    watched.args._n_gpu = 2
    with pytest.raises(ValueError, match="over 2 GPUs, expected a process for each"):
        watched.callback_handler.on_train_begin(watched.args, watched.state, watched.control)
    assert not (tmp_path / "run").exists()


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fp8lab.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'fp8lab\[hf\]'$"):
        import fp8lab.integrations.transformers  # noqa: F401
