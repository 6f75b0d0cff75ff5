"""From what is seen to what to do: the rule table of practitioners, each rule with its evidence from a story. Pure.

`advise` gives the rules that a story shows; `advice_table` prints all of them, for the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradmon.diagnose import symptoms
from gradmon.diagnose.story import Story
from gradmon.diagnose.telling import NO_MODULE, factory_of


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table."""

    name: str
    seen: str
    """The symptom, for a person."""
    causes: tuple[str, ...]
    """Likely ones, likeliest first."""
    cures: tuple[str, ...]
    """What to do, first things first. `BUNDLE` stands for an incident's bundle, MODULE:FACTORY for the model."""
    evidence: Callable[[Story], str]
    """What of it a story shows, in numbers; "" if nothing."""
    urgent: bool = False
    """True if the run, or its result, is lost unless somebody acts."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A rule that a story shows."""

    rule: str
    seen: str
    evidence: str
    causes: tuple[str, ...]
    cures: tuple[str, ...]
    urgent: bool


def advise(story: Story) -> list[Advice]:
    """The rules that `story` shows, urgent ones first; empty for a healthy run.

    The command that replays the incident stands once above them, wherever they are shown.
    """
    found = []
    for rule in RULES:
        evidence = rule.evidence(story)
        if evidence:
            cures = tuple(_cure_for(story, cure) for cure in rule.cures)
            found.append(Advice(rule.name, rule.seen, evidence, rule.causes, cures, rule.urgent))
    return sorted(found, key=lambda advice: not advice.urgent)


def _cure_for(story: Story, cure: str) -> str:
    if _RUN_AGAIN not in cure:
        return cure.replace(NO_MODULE, factory_of(story.identity.script)[1])
    return _NO_BUNDLE if story.best_bundle is None else cure.replace(_RUN_AGAIN, "replay it (above)")


def advice_table() -> str:
    """All rules as a table in Markdown: what is seen, likely causes, what to do."""
    lines = ["| what is seen | likely causes | what to do |", "|---|---|---|"]
    for rule in RULES:
        cells = (f"**{rule.name}**: {rule.seen}", "; ".join(rule.causes), "; ".join(rule.cures))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_RUN_AGAIN = f"run `gradmon replay BUNDLE --model {NO_MODULE}`"
_REPLAY = f"{_RUN_AGAIN}: it names the operation that broke first"

#: In its place where there is none: what is kept are steps whose gradients broke.
_NO_BUNDLE = (
    "no incident's bundle lies here to be replayed (a NaN loss with finite gradients saves none): run that batch alone,"
    " under `torch.autograd.detect_anomaly()`"
)

_GRADIENTS = (
    Rule(
        "one bad rank",
        "one rank of several causes most of the non-finite steps",
        ("bad data in that rank's shard", "a race in a kernel", "a broken GPU or memory (ECC errors)"),
        (
            f"{_RUN_AGAIN}: reproduced means the data or the code; unclear says nothing (the loss was not in the "
            "bundle); not reproduced with the step's own weights (`incident.weights: true`) points to hardware",
            "look through that rank's shard of the data, the samples of these steps first",
            "only after more than a handful of such steps, none of them reproduced: look for ECC and Xid errors "
            "(`nvidia-smi -q -d ECC`, `dmesg | grep Xid`), then swap the node",
            "set `leave_out.bad_rank: true` to go on without that rank meanwhile",
        ),
        symptoms.one_bad_rank,
        urgent=True,
    ),
    Rule(
        "NaN from one batch",
        "single steps are not finite, the steps around them are healthy, on one rank or on all",
        (
            "a sample with NaN, Inf or an empty target; where all ranks broke at once, more likely the code",
            "log(0), 0/0 in a masked mean, sqrt at 0 in the backward pass",
            "overflow of exp in half precision",
        ),
        (
            _REPLAY,
            "filter such samples when they are loaded: `torch.isfinite(x).all()`",
            "put an epsilon where it breaks: `log(x.clamp_min(1e-8))`, `x.sum() / mask.sum().clamp_min(1)`, "
            "`sqrt(x + 1e-8)`",
        ),
        symptoms.one_bad_batch,
    ),
    Rule(
        "broken for good",
        "ten or more steps in a row are not finite, or as many as gradmon stops the run for",
        (
            "the weights or the optimizer's moments are NaN",
            "the learning rate is too high",
            "an operation that overflows",
        ),
        (
            "go back to the last healthy checkpoint (health.json has its step) and lower the learning rate, by a third "
            "to a half",
            _REPLAY,
            "keep `mode: guard`, so that no such step reaches the weights",
        ),
        symptoms.broken_for_good,
        urgent=True,
    ),
    Rule(
        "fp16 overflow",
        "the GradScaler skips steps again and again, or in a row",
        ("activations or losses beyond 65,504, the range of fp16", "a true NaN, which halves the scale for ever"),
        (
            "train in bf16, which has the range of fp32: `torch.autocast('cuda', dtype=torch.bfloat16)`, no GradScaler",
            "compute softmax, norms and the loss in fp32",
            "lower GradScaler's `init_scale` and `growth_factor`, or raise its `growth_interval`",
            _REPLAY,
        ),
        symptoms.scaler_overflow,
        urgent=True,
    ),
    Rule(
        "explodes early",
        "half of the spikes or more lie in the first 200 steps of a longer run",
        ("no learning-rate warm-up", "initial weights of the wrong size", "no gradient clipping"),
        (
            "warm the learning rate up over 1 to 5 % of the run: `torch.optim.lr_scheduler.LinearLR(optimizer, 0.01)`",
            "initialise for the activation: Xavier for tanh and sigmoid (`nn.init.xavier_uniform_`), He for ReLU "
            "(`nn.init.kaiming_normal_`); audit it with `gradmon doctor MODULE:FACTORY`",
            "clip from the first step on, where the detector is not active yet: `clip.max_norm: 1.0`",
        ),
        symptoms.explodes_early,
    ),
    Rule(
        "spikes",
        "spikes in a row, a back-off of the learning rate, or more than one spike in 1,000 steps",
        (
            "the learning rate is too high",
            "bad or unlike batches",
            "too small a batch",
            "Adam's beta2 too close to 1",
        ),
        (
            "lower the learning rate, by a third to a half, and watch: spikes that stay come from the data",
            "clip: `clip.max_norm` at 1 to 2 times the usual norm, or `torch.nn.utils.clip_grad_norm_`",
            "shuffle better and look at the batches of these steps; accumulate over more micro-steps",
            "set beta2 to 0.95; add weight decay; normalise queries and keys in attention",
            "a simpler or shallower model, if nothing else helps",
        ),
        symptoms.spikes,
    ),
    Rule(
        "one parameter explodes",
        "most spikes have their largest gradient in one parameter",
        (
            "shared (tied) weights gather a gradient from each place they are used in",
            "growth at an upsampling or a concatenation",
            "wrong initial size of that layer",
        ),
        (
            "shared weights: detach all uses but one (`weight.detach()`), or scale by 1/sqrt(number of uses)",
            "initialise that layer for its activation (Xavier, He), and put a normalisation before or after it",
            "give it a parameter group with a lower learning rate",
            _REPLAY,
        ),
        symptoms.one_parameter,
    ),
    Rule(
        "norms drift up",
        "gradient norms grow far above their lowest level, or the run was rolled back",
        (
            "the learning rate is too high for where the run is now",
            "gradients that add up from step to step: no `optimizer.zero_grad()`",
            "weights that grow without bound",
            "changed data",
        ),
        (
            "see that `optimizer.zero_grad()` is called once per step, before the backward",
            "lower the learning rate and watch; decay it sooner",
            "add weight decay (0.01 to 0.1 with AdamW, none on norms and biases)",
            "keep snapshots: `rollback.every_steps: 200`, with an observed loss",
            "normalise queries and keys; bound the logits (z-loss)",
        ),
        symptoms.drift,
        urgent=True,
    ),
    Rule(
        "vanished gradients",
        "gradients fall to a thousandth of their level, or below 1e-7 per element",
        (
            "saturated sigmoid or tanh",
            "depth without residuals and norms",
            "initial weights too small",
            "loss at 0",
            "where the norm is exactly 0: a batch without a label that counts (all `ignore_index`), `detach()`",
        ),
        (
            "He initialisation for ReLU, Xavier for tanh and sigmoid",
            "LeakyReLU, SELU or GELU in place of sigmoid, tanh and ReLU",
            "residual connections and normalisation layers; else a simpler or shallower model",
            "audit the profile over the layers: `gradmon doctor MODULE:FACTORY`",
            "leave batches out in which every label is ignored: `if (labels != -100).any()`",
        ),
        symptoms.vanished,
        urgent=True,
    ),
    Rule(
        "dead units",
        "more than half of a weight's gradient is exactly 0",
        (
            "dead ReLUs: their input is never above 0",
            "a learning rate that was too high",
            "masked inputs",
        ),
        (
            "LeakyReLU, SELU (with `lecun_normal_`) or GELU in place of ReLU",
            "He initialisation, biases at 0; lower the learning rate",
            "an in-place ReLU (`nn.ReLU(inplace=True)`) on a reused tensor changes its other use: set `inplace=False`",
        ),
        symptoms.dead_units,
    ),
    Rule(
        "frozen parameters",
        "parameters without a gradient, or weights that do not change",
        ("`requires_grad=False`, or a `.detach()` too many", "a branch that is never used", "not in the optimizer"),
        (
            "check that it is meant; else look for `detach()`, `no_grad()` and `.data` on the way to the loss",
            "give what is never used away: it costs memory, and DDP needs `find_unused_parameters=True` for it",
        ),
        symptoms.frozen,
    ),
    Rule(
        "updates too large",
        "a step moves the weights by more than a tenth of their norm",
        ("the learning rate is too high", "weights that are very small"),
        ("lower the learning rate by a factor of 3 to 10, and watch", "warm it up; initialise the weights larger"),
        symptoms.updates_too_large,
    ),
    Rule(
        "updates too small",
        "a step moves the weights by less than 1e-7 of their norm",
        ("the learning rate is too low, or has decayed to 0", "bf16 weights: the update is rounded away"),
        (
            "raise the learning rate: `gradmon doctor` runs a short range test",
            "keep fp32 master weights, or an optimizer that rounds stochastically",
        ),
        symptoms.updates_too_small,
    ),
    Rule(
        "replicas diverged",
        "ranks no longer hold the same weights",
        (
            "non-deterministic or rank-dependent code (a seed, a version, `if rank == 0` around a step)",
            "weights changed outside of the optimizer",
            "a broken GPU that computes wrong numbers",
        ),
        (
            "stop, and go back to the last checkpoint at which they agreed; all ranks load the same file",
            "same code, versions and seeds on all ranks; `torch.use_deterministic_algorithms(True)` finds the place",
            "if it is always the same rank: swap its node",
            "set `stop.on_divergence: true`",
        ),
        symptoms.replicas,
        urgent=True,
    ),
    Rule(
        "always clipped",
        "95 % of the steps or more are clipped, to a fifth of their norm or less",
        ("`clip.max_norm` is far below the usual norm: the step's length no longer follows the gradient",),
        ("raise `clip.max_norm` to 1 to 2 times the usual norm", "or keep it, and tune the learning rate to it"),
        symptoms.always_clipped,
    ),
)

_LOSS = (
    Rule(
        "loss not finite",
        "the observed loss is NaN or Inf",
        ("log(0), 0/0 in a masked mean, overflow of exp", "NaN in the inputs or the weights", "all labels masked"),
        (
            _REPLAY,
            "an epsilon in log and division; losses from logits (`cross_entropy`, `binary_cross_entropy_with_logits`)",
            "check inputs and labels when they are loaded; leave batches out in which every label is ignored",
        ),
        symptoms.loss_not_finite,
    ),
    Rule(
        "loss does not fall",
        "the loss is where it began",
        ("the learning rate is too low or too high", "labels that do not belong to their inputs", "frozen parameters"),
        (
            "overfit a single batch first: if that fails the model or the loss is wrong",
            "raise or lower the learning rate by a factor of 3: `gradmon doctor` runs a range test",
            "check that inputs and labels are shuffled together, and that all parameters have gradients",
            "Xavier/He initialisation; normalised inputs",
        ),
        symptoms.loss_flat,
    ),
    Rule(
        "loss rises",
        "the running loss is far above its best",
        ("the learning rate is too high", "changed data", "a spike that reached the weights"),
        (
            "go back to the last healthy checkpoint, lower the learning rate by a third to a half, and watch",
            "let it decay sooner; clip gradients; add weight decay",
            "let gradmon do it: `rollback.every_steps: 200`",
        ),
        symptoms.loss_rose,
        urgent=True,
    ),
    Rule(
        "loss spikes",
        "losses far above the running median, or of one rank alone",
        ("bad or unlike batches", "the learning rate is too high", "one rank's shard"),
        ("look at the batches of these steps", "lower the learning rate and watch", "shuffle over all shards"),
        symptoms.loss_spikes,
    ),
    Rule(
        "loss too good",
        "the loss is abnormally low, or constant",
        ("labels that leak into the inputs", "masked labels only", "layers whose output has vanished", "overfit"),
        (
            "look at a batch: are the labels in the inputs, are all of them masked (-100)?",
            "compare with the loss of guessing (log of the number of classes) and with the validation loss",
            "split training and validation data anew, without duplicates",
        ),
        symptoms.loss_too_good,
    ),
    Rule(
        "overfit",
        "validation loss 10 % or more above the training loss",
        ("too large a model for the data", "too many epochs", "no regularisation"),
        (
            "data augmentation, or more data",
            "weight decay and dropout",
            "early stopping: end training where `monitor.should_stop` says so, and keep the best checkpoint",
            "a simpler or shallower model",
        ),
        symptoms.overfit,
    ),
    Rule(
        "overtraining",
        "the validation loss has not had a new best for long",
        ("the model has learnt what the data has",),
        ("early stopping: `if monitor.should_stop: break`; keep the best checkpoint", "lower the learning rate once"),
        symptoms.overtraining,
    ),
    Rule(
        "bad inputs",
        "inputs or labels that are not finite, out of range, constant or duplicated",
        ("damaged files", "a preprocessing step that was left out or done twice", "a sampler that repeats itself"),
        ("look at the samples that are named", "normalise inputs; clamp outliers; drop what is not finite",
         "give each rank its own part: `DistributedSampler`, with `set_epoch` in each epoch"),
        symptoms.bad_inputs,
    ),
    Rule(
        "class imbalance",
        "some classes come far more often than others",
        ("the data is so", "sorted data that is not shuffled"),
        ("weigh the classes in the loss (`cross_entropy(weight=)`) or draw evenly (`WeightedRandomSampler`)",
         "shuffle; data augmentation for the rare classes"),
        symptoms.imbalance,
    ),
)  # fmt: skip

_MACHINES = (
    Rule(
        "in-place change",
        "autograd says that a tensor it needs was modified in place",
        (
            "an in-place ReLU or `+=` on a reused tensor, as a residual's input",
            "weights changed before the backward",
        ),
        (
            "`nn.ReLU(inplace=False)` where its input is used again; `x = x + y` for `x += y`",
            "`torch.autograd.set_detect_anomaly(True)` names the line",
        ),
        symptoms.inplace,
        urgent=True,
    ),
    Rule(
        "out of memory",
        "a rank ended with an out-of-memory error",
        ("too large a batch or sequence", "a leak: losses or outputs kept with their graph", "fragmentation"),
        (
            "a smaller micro-batch with gradient accumulation; activation checkpointing; bf16",
            "keep `loss.item()` or `loss.detach()`, never `loss`, in lists and sums",
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        ),
        symptoms.out_of_memory,
        urgent=True,
    ),
    Rule(
        "memory grows",
        "memory grows through the whole run",
        ("losses or outputs kept with their graph", "a cache without bound", "workers that copy their data set"),
        (
            "keep `loss.item()` or `loss.detach()`, never `loss`, in lists and sums",
            "`torch.cuda.memory._record_memory_history()` names who holds what; host memory: `tracemalloc`",
        ),
        symptoms.memory_grows,
    ),
    Rule(
        "killed",
        "a rank's journal has no end",
        ("the kernel's OOM killer, a job's time or memory limit, preemption", "a segmentation fault", "a lost node"),
        (
            "`dmesg | grep -i -E 'killed process|segfault|Xid'` on its host; `sacct -j JOB` or `kubectl describe pod`",
            "raise the memory limit, or use fewer DataLoader workers",
            "go on from the last healthy checkpoint (health.json)",
        ),
        symptoms.killed,
        urgent=True,
    ),
    Rule(
        "hang",
        "living ranks make no steps, or a collective ran into its timeout",
        (
            "ranks in different collectives (`if rank == 0` around one, uneven data)",
            "a rank that died",
            "the network",
        ),
        (
            "`py-spy dump --pid PID` on a waiting and on a late rank; compare where they are",
            "TORCH_NCCL_TRACE_BUFFER_SIZE=2000 and NCCL_DEBUG=INFO for the next run",
            "same number of batches on all ranks: `drop_last=True`, or `torch.distributed.algorithms.Join`",
        ),
        symptoms.hung,
        urgent=True,
    ),
    Rule(
        "exception",
        "a rank ended with an exception",
        ("see its message; ranks that end later mostly end because of the first",),
        ("read the traceback of the rank named here, not of the last one",),
        symptoms.raised,
        urgent=True,
    ),
    Rule(
        "dies at the same step",
        "attempts end at the same step, one after the other",
        ("the same batch kills each attempt", "the checkpoint they go back to holds NaN"),
        (
            "skip that batch",
            _REPLAY,
            "go back one checkpoint further",
        ),
        symptoms.dies_at_same_step,
        urgent=True,
    ),
    Rule(
        "straggler",
        "all ranks wait for one that computes longer",
        ("a GPU that is throttled (heat, power) or shared", "longer samples on that rank", "a slow host"),
        (
            "compare its clocks and temperature with the others': `nvidia-smi -q -d PERFORMANCE,TEMPERATURE`",
            "balance samples by length over the ranks",
            "swap the node",
        ),
        symptoms.straggler,
    ),
    Rule(
        "data wait",
        "a tenth of a step or more, and 5 ms at least, is spent waiting for the DataLoader",
        ("too few workers", "slow or remote storage", "decoding in the training process"),
        (
            "more `num_workers`, `prefetch_factor`, `persistent_workers=True`, `pin_memory=True`",
            "decode and tokenise beforehand; keep the data on a local disk",
        ),
        symptoms.data_wait,
    ),
    Rule(
        "only watched",
        "gradmon saw what it would have acted on, and did not",
        ("`mode: observe`", "a topology in which it only watches"),
        ("set `mode: guard`, so that bad steps are clipped and skipped",),
        symptoms.only_watched,
    ),
    Rule(
        "gradmon's own failures",
        "a part of gradmon failed; training went on",
        ("a full or slow disk", "a bug in gradmon"),
        (
            "look at the part's warning in the training log",
            "free the disk that holds the journals; set `dir:` to another",
        ),
        symptoms.own_errors,
    ),
)

#: All rules, in the order in which they are printed.
RULES: tuple[Rule, ...] = (*_GRADIENTS, *_LOSS, *_MACHINES)
