"""Trainings with `transformers.Trainer` under torchrun, one after the other; what they find, as JSON per rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import hf_launch
import hf_model
import texts
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

import gradmon
from gradmon.integrations.huggingface import GradmonCallback
from gradmon.journal import read_journal

STEPS = 12
ACCUMULATE = 2
BATCH = 2
#: Samples of one epoch on two ranks, but for one micro-batch: its last step has one where the others have two.
SAMPLES = 2 * BATCH * (ACCUMULATE * STEPS // 2 - 1)
#: The loss is so many times larger: the default clip at 1.0 bites at every step.
WEIGHT = 4.0


class Interrupt(TrainerCallback):
    """Ends training after a step, as a time limit does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


class Jobs:
    """Makes trainers, trains, and says what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def trainer(self, name: str, *, callbacks: list[Any], data: Any = None, **settings: Any) -> Any:
        set_seed(1)
        settings = {"report_to": "none", **settings}
        args = TrainingArguments(
            output_dir=str(self.folder / name), use_cpu=True, ddp_backend="gloo", disable_tqdm=True, seed=1,
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATE, max_steps=STEPS,
            learning_rate=3e-3, logging_steps=1, save_strategy="steps", save_steps=5, eval_strategy="steps",
            eval_steps=6, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        trainer = Trainer(
            model=hf_model.build(), args=args, train_dataset=data or hf_model.Text(SAMPLES, weight=WEIGHT),
            eval_dataset=hf_model.Text(8, offset=10_000), callbacks=callbacks,
        )  # fmt: skip
        self.norms = recorded_norms(trainer)
        self.losses = recorded_losses(trainer)
        trainer.wrapped_before = wrapped(trainer)
        return trainer

    def train(self, name: str, *, resume: str | None = None, callbacks: list[Any], **more: Any) -> dict[str, Any]:
        trainer = self.trainer(name, callbacks=callbacks, **more)
        trainer.add_callback(Watching())
        Watching.seen.clear()
        trainer.train(resume_from_checkpoint=resume and str(self.folder / resume))
        model = trainer.model
        return {
            "weights": hf_model.digest(model.parameters()),
            "finite": all(bool(torch.isfinite(p).all()) for p in model.parameters()),
            "moments": hf_model.digest(
                v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
            ),
            "log": trainer.state.log_history,
            "norms": self.norms,
            "losses": self.losses,
            "nan_batches": model.nan_batches,
            "patched": patched(trainer),
            **Watching.seen,
        }


class Watching(TrainerCallback, ExportableState):
    """Comes after gradmon's callback, and keeps what its monitor knows."""

    seen: ClassVar[dict[str, Any]] = {}
    """Of the training in progress: the Trainer may make another object of this one when it resumes."""

    def state(self) -> dict[str, Any]:
        if gradmon.monitor._active is not None:  # a checkpoint is being written
            self.seen["paused to save"] = gradmon.monitor._active._clock.paused
        return {"args": {}, "attributes": {}}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if gradmon.monitor._active is not None:
            self.seen["paused to evaluate"] = gradmon.monitor._active._clock.paused

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        monitor = gradmon.monitor._active
        if monitor is None:
            return
        self.seen |= {"journal": str(monitor.journal_path), "steps": monitor.step, "topology": str(monitor._topology)}
        if state.global_step == state.max_steps:
            self.seen["state"] = json.loads(json.dumps(monitor.state_dict()))


def recorded_norms(trainer: Any) -> list[float]:
    """By plain torch, in float64: of every step, before the Trainer's clip."""
    norms: list[float] = []
    clip = trainer.accelerator.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        flat = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        norms.append(float(flat.norm()))
        return clip(parameters, *args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
    return norms


def recorded_losses(trainer: Any) -> list[float]:
    """What `training_step` has returned, of every micro-step of this rank."""
    losses: list[float] = []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    return losses


def wrapped(trainer: Any) -> dict[str, Any]:
    """What of its methods this trainer has of its own."""
    return {name: value for name, value in vars(trainer).items() if hasattr(type(trainer), name) and callable(value)}


def patched(trainer: Any) -> list[str]:
    """What is wrapped that was not when the trainer was made, and whether gradmon is still attached."""
    left = [name for name, value in wrapped(trainer).items() if value is not trainer.wrapped_before.get(name)]
    left += ["backward"] * ("backward" in vars(trainer.accelerator))
    return left + ["attached"] * (gradmon.monitor._active is not None)


def error_of(call: Any) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def out_of_memory(*_args: Any, **_kwargs: Any) -> Any:
    raise MemoryError("as planned")


def fine_tune(folder: Path) -> dict[str, Any]:
    """TRL's trainer for supervised fine-tuning, over plain text."""
    set_seed(1)
    lines = bytes(texts.text(20_000).tolist()).decode(errors="replace").split("\n\n")
    args = SFTConfig(
        output_dir=str(folder / "sft"), use_cpu=True, bf16=False, ddp_backend="gloo", disable_tqdm=True,
        report_to="none", per_device_train_batch_size=2, max_steps=4, logging_steps=1, save_strategy="no",
        max_length=texts.WINDOW, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=hf_model.build(), args=args, train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=hf_model.tokenizer(), callbacks=[GradmonCallback()],
    )  # fmt: skip
    norms = recorded_norms(trainer)
    trainer.add_callback(Watching())
    Watching.seen.clear()
    trainer.train()
    return {"log": trainer.state.log_history, "norms": norms, **Watching.seen}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    jobs = Jobs(folder)
    found: dict[str, Any] = {}
    found["plain"] = jobs.train("plain", callbacks=[])
    found["watched"] = jobs.train("watched", callbacks=[GradmonCallback()], report_to="tensorboard")

    # The same, interrupted after step 7, and resumed from the checkpoint of step 5.
    jobs.train("parted", callbacks=[GradmonCallback(), Interrupt(7)])
    resume = "parted/checkpoint-5"
    found["resumed"] = jobs.train("parted", resume=resume, callbacks=[GradmonCallback()])
    found["restored"] = jobs.train(
        "restored", resume=resume, callbacks=[GradmonCallback()], restore_callback_states_from_checkpoint=True
    )
    found["without state"] = jobs.train("without", resume="plain/checkpoint-5", callbacks=[GradmonCallback()])

    poisoned = hf_model.Text(SAMPLES, weight=WEIGHT, nan=5)
    found["nan plain"] = jobs.train("nan-plain", callbacks=[], data=poisoned)
    found["nan watched"] = jobs.train("nan-watched", callbacks=[GradmonCallback()], data=poisoned)

    broken = jobs.trainer("broken", callbacks=[GradmonCallback()], data=hf_model.Text(SAMPLES, broken=25))
    broken.add_callback(Watching())
    Watching.seen.clear()
    found["broken"] = {"error": error_of(broken.train), "patched": patched(broken)}
    view = read_journal(Path(Watching.seen["journal"]))
    found["broken"]["end"] = [view.state, view.end_detail]
    broken.train_dataset = hf_model.Text(SAMPLES)
    broken.train()
    found["broken"]["steps after"] = broken.state.global_step

    late = jobs.trainer("late", callbacks=[])
    late.add_callback(GradmonCallback())
    late.compute_loss = out_of_memory
    late.wrapped_before = wrapped(late)
    found["late"] = {"error": error_of(late.train), "patched": patched(late)}

    twice = jobs.trainer("twice", callbacks=[GradmonCallback()])
    with gradmon.attach(twice.model, torch.optim.SGD(twice.model.parameters())):
        found["twice"] = {"error": error_of(twice.train)}
    found["twice"]["patched"] = patched(twice)

    control = TrainerControl()
    state = TrainerState()
    alone = GradmonCallback()
    found["alone"] = {"error": error_of(lambda: alone.on_train_begin(twice.args, state, control, model=twice.model))}
    found["sft"] = fine_tune(folder)

    hf_launch.leave(folder, dist.get_rank(), found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
