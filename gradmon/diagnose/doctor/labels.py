"""The first loss and the labels it was computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradmon.diagnose.doctor.activations import SAGEMAKER
from gradmon.diagnose.doctor.probe import Evidence, Labels
from gradmon.diagnose.doctor.trace import Operation
from gradmon.record import Finding

#: A model that knows nothing yet has a cross entropy of ln(C). Logits of standard deviation 2 make it ln(C) + 2.
LOSS_ABOVE = 2.0
#: Under half of ln(C) the model knows the labels already: pretrained, or they leak.
LOSS_BELOW = 0.5
#: Most frequent over least frequent class (SageMaker Debugger, ClassImbalance: 10).
IMBALANCE_RATIO = 10.0
#: Fewer labels per class say nothing about their shares: chance alone makes a ratio of 10 of 3 expected each.
LEAST_PER_CLASS = 10
#: Loss -> what it does to its input itself, and what must not be done to it before.
_INSIDE = {
    "cross_entropy": ("log_softmax", "softmax"),
    "binary_cross_entropy_with_logits": ("a sigmoid", "sigmoid"),
}
#: All labels alike are chance in fewer of them.
LEAST_LABELS = 8


def check_labels(evidence: Evidence) -> Iterator[Finding]:
    """All findings about loss and labels; a complaint is made once, however often the loss function was called."""
    if evidence.loss is not None and not math.isfinite(evidence.loss):
        yield Finding(
            "nonfinite_loss",
            "loss",
            f"the loss of the first forward is {evidence.loss}",
            threshold=0.0,
            source=f"{SAGEMAKER}, ExplodingTensor",
            cure="keep logarithms, roots and quotients off 0; check the batch with torch.isfinite(inputs).all()",
            severity="error",
        )
    yield from _squashed_twice(evidence.operations)
    told: set[str] = set()
    per_batch = len([labels for labels in evidence.labels if labels.per_sample]) == 1
    for labels in evidence.labels:
        for finding in _judged(labels, alone=per_batch):
            if finding.rule not in told:
                told.add(finding.rule)
                yield finding


def _squashed_twice(operations: Sequence[Operation]) -> Iterator[Finding]:
    """A softmax before a loss that has one inside, or a sigmoid."""
    for loss in operations:
        inner, squashed = _INSIDE.get(loss.name, ("", ""))
        before = operations[loss.inputs[0]] if inner and loss.inputs else None
        while before is not None and before.kind == "pass" and before.inputs:
            before = operations[before.inputs[0]]
        if before is not None and before.name == squashed:
            yield Finding(
                "squashed_twice",
                before.place,
                f"{loss.name} is given what comes out of {before.told}, and applies {inner} itself: gradients are"
                " small, and the loss never gets near 0",
                source=f"PyTorch, {loss.name}: the input is unnormalised logits",
                cure=f"give it the logits, without {squashed}; use {squashed} for predictions only",
            )
            return


def _judged(labels: Labels, *, alone: bool) -> Iterator[Finding]:
    if labels.out_of_range:
        yield _out_of_range(labels)
        return
    if labels.count == 0:
        yield _finding(labels, "bad_labels", "all labels are ignored: the loss is 0 / 0", 0.0, 1.0, "error")
        return
    # A GAN's discriminator is asked for "all real" and then for "all fake": only a lone call tells.
    alone = alone and labels.given
    if alone and labels.per_sample and labels.hard and labels.count >= LEAST_LABELS and labels.classes > 1:
        if labels.most == labels.count:
            message = f"all {labels.count} labels of the batch are {labels.lowest:g}"
            yield _finding(labels, "constant_labels", message, float(labels.most), float(labels.count))
        elif labels.count >= LEAST_PER_CLASS * labels.classes and not labels.weighted:
            ratio = labels.most / max(1, labels.least)
            if ratio > IMBALANCE_RATIO:
                message = f"the most frequent class has {labels.most} labels in the batch, the rarest {labels.least}"
                yield _finding(labels, "class_imbalance", message, ratio, IMBALANCE_RATIO)
    if labels.hard and not labels.weighted and math.isfinite(labels.value) and labels.classes > 1:
        yield from _first_loss(labels)


def _out_of_range(labels: Labels) -> Finding:
    if labels.loss.startswith("binary"):
        allowed, source = "0 to 1", "PyTorch, BCEWithLogitsLoss: targets between 0 and 1"
        cure = "labels = labels.float().clamp(0, 1), or the loss for what they really are"
    else:
        allowed, source = f"0 to {labels.classes - 1}", "PyTorch, CrossEntropyLoss: 0 <= label < C"
        cure = (
            f"nn.Linear(width, {int(labels.highest) + 1}) as the head, or map the labels to 0..{labels.classes - 1};"
            " ignore_index= for padding"
        )
    return Finding(
        "bad_labels",
        labels.loss,
        f"{labels.out_of_range} of {labels.count} labels for {labels.loss} lie outside {allowed}: they go from"
        f" {labels.lowest:g} to {labels.highest:g}",
        measured=float(labels.out_of_range),
        threshold=0.0,
        source=source,
        cure=cure,
        severity="error",
    )


def _finding(
    labels: Labels, rule: str, message: str, measured: float, threshold: float, severity: str = "warning"
) -> Finding:
    cures = {
        "bad_labels": "check the mask and ignore_index: (labels != ignore_index).any() must hold in each batch",
        "constant_labels": "shuffle: DataLoader(dataset, shuffle=True); check how the labels are read",
        "class_imbalance": "WeightedRandomSampler(1 / counts[labels], len(labels)), or"
        " nn.CrossEntropyLoss(weight=counts.sum() / (C * counts))",
    }
    source = f"{SAGEMAKER}, ClassImbalance (10)" if rule == "class_imbalance" else "fact: there is nothing to learn"
    return Finding(
        rule,
        labels.loss,
        message,
        measured,
        threshold,
        source,
        cures[rule],
        "error" if severity == "error" else "warning",
    )


def _first_loss(labels: Labels) -> Iterator[Finding]:
    expected = math.log(labels.classes)
    if labels.value > LOSS_ABOVE * expected:
        yield Finding(
            "loss_at_start",
            labels.loss,
            f"the first {labels.loss} is {labels.value:.3g}, {labels.value / expected:.3g} times the"
            f" ln({labels.classes}) = {expected:.3g} of a model that knows nothing: its logits are too large",
            measured=labels.value,
            threshold=LOSS_ABOVE * expected,
            source="fact: equal probabilities give ln(C)",
            cure="nn.init.normal_(head.weight, std=0.01); nn.init.zeros_(head.bias); a norm layer before the head;"
            " inputs of mean 0 and variance 1",
        )
    elif labels.value < LOSS_BELOW * expected:
        yield Finding(
            "loss_at_start",
            labels.loss,
            f"the first {labels.loss} is {labels.value:.3g}, under half of ln({labels.classes}) = {expected:.3g}:"
            " unless the model is trained already, it is given the labels",
            measured=labels.value,
            threshold=LOSS_BELOW * expected,
            source="fact: equal probabilities give ln(C)",
            cure="look for the label among the inputs, shift language-model targets by one, check the causal mask",
            severity="info",
        )
