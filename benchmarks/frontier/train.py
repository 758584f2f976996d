"""Training an arm and measuring it: several jobs as one model, on a GPU a step as a CUDA graph."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arms import Arm
from .data import DOMAINS, TASKS, Data
from .layers import FactoredLinear, OrthogonalSubspaceLinear, UpdatedLinear, singular, start_of
from .moments import Moments, linears, projection, rank_of
from .stacked import Stacked, heads, stack

SCALES = (0.25, 0.5, 0.75, 1.0)  # of the update that is merged
_LOGITS = 2**27  # that are in memory at a time, in float32 and some five copies
BATCH = 4  # sequences of a step; with general text half of them are it


@dataclass(frozen=True)
class Job:
    """One training."""

    arm_name: str
    arm: Arm
    task: str
    rate: float
    seed: int
    steps: int

    def spec(self) -> dict[str, Any]:
        """What the result depends on, as its record keeps it."""
        changed = {
            field.name: getattr(self.arm, field.name)
            for field in fields(self.arm)
            if field.name != "rates" and getattr(self.arm, field.name) != field.default
        }
        return {
            "arm": self.arm_name,
            "settings": changed,
            "task": self.task,
            "rate": self.rate,
            "seed": self.seed,
            "steps": self.steps,
        }


class Laboratory:
    """The base, the data and the moments, on one device."""

    def __init__(self, base: Any, data: Data, moments: dict[str, Moments]) -> None:
        self.base = base.eval().requires_grad_(False)
        self.device = next(base.parameters()).device
        self.data, self.moments = data, moments
        self._states = {name: self._hidden(self.base, name, 1)[0][0] for name in DOMAINS}
        self.before = {task: self.losses(self.base, task, 1)[0] for task in TASKS}

    @torch.no_grad()
    def _hidden(self, model: Any, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Last hidden states of the places that predict a label, of each of ``count`` models.

        Sequences of like length go together, and nothing runs behind their last label.

        Returns:
            ``[count, tokens, hidden]``, and the labels ``[tokens]``.
        """
        ids, labels = self.data.ids[name], self.data.labels[name]
        places = torch.arange(ids.shape[1], device=ids.device)
        ends = ((labels != -100) * places).amax(1)
        states, wanted = [], []
        for chosen in ends.argsort(stable=True).split(16):
            end = int(ends[chosen[-1]])
            hidden = model.model(input_ids=ids[chosen, :end].repeat(count, 1), use_cache=False)
            following = labels[chosen, 1 : end + 1]
            labelled = following != -100
            states.append(hidden.last_hidden_state.unflatten(0, (count, -1))[:, labelled])
            wanted.append(following[labelled])
        return torch.cat(states, 1), torch.cat(wanted)

    @torch.no_grad()
    def losses(self, model: Any, task: str, count: int) -> list[float]:
        """Nats a token of a task's held-out texts, of each of ``count`` models."""
        states, wanted = self._hidden(model, f"{task}/test", count)
        figures = []
        for own, head in zip(states, heads(model, count), strict=True):
            loss = torch.zeros((), device=self.device)
            size = min(2048, _LOGITS // len(head))
            for part, target in zip(own.split(size), wanted.split(size), strict=True):
                loss += functional.cross_entropy(part @ head.T, target, reduction="sum")
            figures.append(_digits(loss / len(wanted)))
        return figures

    @torch.no_grad()
    def measure(self, model: Any, task: str, count: int) -> list[dict[str, float]]:
        """Nats a token, of each of ``count`` models: held-out loss and each domain's KL."""
        figures = [{"loss": loss} for loss in self.losses(model, task, count)]
        (base_head,) = heads(self.base, 1)
        own_heads = heads(model, count)
        size = min(2048, _LOGITS // len(base_head))
        for domain in DOMAINS:
            states = self._hidden(model, domain, count)[0]
            totals = torch.zeros(count, device=self.device)
            for start in range(0, states.shape[1], size):
                before = self._states[domain][start : start + size]
                p = (before @ base_head.T).log_softmax(-1)
                for i, head in enumerate(own_heads):
                    q = (states[i, start : start + size] @ head.T).log_softmax(-1)
                    totals[i] += functional.kl_div(q, p, reduction="sum", log_target=True)
            for figure, total in zip(figures, totals / states.shape[1], strict=True):
                figure[domain] = _digits(total)
        return figures


def _digits(value: Tensor) -> float:
    return float(f"{float(value):.6g}")


Memo = dict[tuple[Any, ...], Any]


def prepare(job: Job, lab: Laboratory, generator: torch.Generator, memo: Memo) -> Any:
    """A job's model: the base's, with what is trained as copies or updates.

    Args:
        generator: of LoRA's factors.
        memo: masks and starts that jobs share, by what they are.
    """
    arm = job.arm
    shared = itertools.chain(lab.base.parameters(), lab.base.buffers())
    model = copy.deepcopy(lab.base, {id(tensor): tensor for tensor in shared})
    layers = linears(model)
    names = list(layers)
    rows_generator = torch.Generator().manual_seed(77 + job.seed)
    for name, linear in layers.items():
        part = name.rpartition(".")[2]
        wanted = {
            "down_proj": part == "down_proj",
            "mlp": part in ("gate_proj", "up_proj", "down_proj"),
            "linears": True,
        }[arm.targets]
        protected = arm.protect is not None and (part == "down_proj" or not arm.whole)
        if not wanted or (arm.whole and not protected):
            continue
        mask = _mask(job, lab, names, name, memo) if protected else None
        rows, entries = None, None
        if arm.entries is not None:
            entries = _entries(job, linear, rows_generator)
        elif arm.quota < 100:
            count = round(arm.quota / 100 * linear.out_features)
            if arm.rows == "random":
                order = torch.randperm(linear.out_features, generator=rows_generator)
            else:
                sensitivity = lab.moments[arm.moments].sensitivity[name]
                order = sensitivity.argsort(descending=arm.rows == "most")
            rows = order[:count].sort().values.to(lab.device)
        scale = None
        if arm.row_steps:
            sensitivity = lab.moments[arm.moments].sensitivity[name]
            chosen = sensitivity if rows is None else sensitivity[rows]
            scale = (chosen / chosen.median()).rsqrt().clamp(0.25, 4.0)
            scale = scale / scale.mean()
        parent, _, attribute = name.rpartition(".")
        start = _start(job, lab, name, linear, memo)
        layer: UpdatedLinear
        if arm.start == "svd":
            layer = OrthogonalSubspaceLinear(linear, start)
        else:
            layer = FactoredLinear(linear, rows, scale, arm.rank, mask, generator, start, entries)
            if arm.fixed_factor:
                cast(nn.Parameter, layer.factor).requires_grad_(False)
        setattr(model.get_submodule(parent), attribute, layer)
    if arm.whole:
        _train_the_rest(model)
    return model


def _train_the_rest(model: nn.Module) -> None:
    """Copies of all parameters outside updated layers in their places, tied ones once."""
    copies: dict[int, nn.Parameter] = {}
    updated = [n for n, m in model.named_modules() if isinstance(m, UpdatedLinear)]
    for name, module in model.named_modules():
        if any(name == outer or name.startswith(f"{outer}.") for outer in updated):
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
            setattr(module, own, copies[id(parameter)])


def _entries(job: Job, linear: nn.Linear, generator: torch.Generator) -> Tensor:
    """Which entries of a weight are trained, ``[out, in]`` of zeros and ones."""
    weight = linear.weight.detach()
    if job.arm.entries == "random":
        scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        scores = weight.abs()
    count = round(job.arm.quota / 100 * weight.numel())
    chosen = scores.flatten().topk(count, largest=False).indices
    entries = torch.zeros(weight.numel(), device=weight.device)
    entries[chosen] = 1
    return entries.view_as(weight)


def _start(job: Job, lab: Laboratory, name: str, linear: nn.Linear, memo: Memo) -> Any:
    """What the update is trained from, by the arm's ``start``."""
    arm = job.arm
    if arm.start is None:
        return None
    key = (arm.start, name)
    if key not in memo:
        if arm.start == "svd":
            memo[key] = singular(linear.weight.detach())
        else:
            moments = lab.moments[arm.moments]
            values, vectors = moments.values[name], moments.vectors[name]
            rank = cast(int, arm.rank)
            memo[key] = start_of(arm.start, linear.weight, values, vectors, rank)
    return memo[key]


def _mask(job: Job, lab: Laboratory, names: list[str], name: str, memo: Memo) -> Tensor:
    """M of a layer's update."""
    arm, other = job.arm, name
    if arm.protect == "other":  # the same matrix, seven layers on
        part = name.rpartition(".")[2]
        alike = [n for n in names if n.rpartition(".")[2] == part]
        other = alike[(alike.index(name) + 7) % len(alike)]
    moments = lab.moments[arm.moments]
    values, vectors = moments.values[other], moments.vectors[other]
    rank = rank_of(values, arm.share, arm.directions)
    number = 10_000 * job.seed + names.index(name)
    key = (arm.moments, arm.protect, other, rank, number if arm.protect == "random" else 0)
    if key not in memo:
        memo[key] = projection(cast(str, arm.protect), values, vectors, rank, number)
    return cast(Tensor, memo[key])


class Run:
    """Jobs of one arm, task and number of steps: their models as one, its optimizer and step."""

    def __init__(self, jobs: Sequence[Job], lab: Laboratory) -> None:
        self.jobs, self.lab = jobs, lab
        self.arm, self.task = jobs[0].arm, jobs[0].task
        steps, device = jobs[0].steps, lab.device
        generators = [torch.Generator().manual_seed(1000 + job.seed) for job in jobs]
        memo: Memo = {}
        self.model = stack(
            [prepare(job, lab, g, memo) for job, g in zip(jobs, generators, strict=True)]
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.initial = [p.detach().clone() for p in self.parameters] if self.arm.whole else None
        self.parts = [self.parameters]  # of each job
        if len(jobs) > 1:
            self.parts = [
                [nn.Parameter(p.detach()[i]) for p in self.parameters] for i in range(len(jobs))
            ]
        on_gpu = device.type == "cuda"
        self.rate = torch.zeros(len(jobs), device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": part, "lr": rate if on_gpu else 0.0}
                for part, rate in zip(self.parts, self.rate.unbind(0), strict=True)
            ],
            weight_decay=0.0,
            fused=True,
            capturable=on_gpu,
        )
        warm = max(1, steps // 10)
        factors = [min((i + 1) / warm, (steps - i) / (steps - warm + 1)) for i in range(steps)]
        self.rates = torch.tensor([[job.rate * f for job in jobs] for f in factors], device=device)
        self.order = torch.stack([self._order(g) for g in generators], 1).to(device)
        self.step_number = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _order(self, generator: torch.Generator) -> Tensor:
        """The sequences of each step, ``[steps, batch]``: of the task, then of general text."""
        half, steps = BATCH // 2 if self.arm.general else BATCH, self.jobs[0].steps
        counts = [(len(self.lab.data.ids[f"{self.task}/train"]), half)]
        if self.arm.general:
            counts.append((len(self.lab.data.ids[self.arm.source]), BATCH - half))
        columns = []
        for available, each in counts:
            wanted = each * steps
            drawn = [
                torch.randperm(available, generator=generator)
                for _ in range(math.ceil(wanted / available))
            ]
            columns.append(torch.cat(drawn)[:wanted].view(steps, each))
        return torch.cat(columns, 1)

    def _losses(self) -> list[Tensor]:
        """Of each job's batch."""
        order = self.order[self.step_number][0]  # [jobs, batch]
        half = BATCH // 2 if self.arm.general else BATCH
        data, arm, count = self.lab.data, self.arm, len(self.jobs)
        ids = data.ids[f"{self.task}/train"][order[:, :half]]
        labels = data.labels[f"{self.task}/train"][order[:, :half]]
        general_ids = None
        if arm.general:
            general_ids = data.ids[arm.source][order[:, half:]].flatten(0, 1)
            ids = torch.cat([ids, data.ids[arm.source][order[:, half:]]], 1)
            labels = torch.cat([labels, data.labels[arm.source][order[:, half:]]], 1)
        if self.lab.device.type == "cpu":  # a captured step's shapes are fixed, these are not
            end = int((labels != -100).any(1).any(0).nonzero().max()) + 1
            ids, labels = ids[..., :end], labels[..., :end]
        hidden = self.model.model(input_ids=ids.flatten(0, 1), use_cache=False).last_hidden_state
        states = hidden[:, :-1].unflatten(0, (count, -1)).unbind(0)
        before: Sequence[Tensor | None] = [None] * count
        if arm.general == "kl":
            with torch.no_grad():
                base = self.lab.base.model(input_ids=general_ids, use_cache=False)
            before = base.last_hidden_state[:, : labels.shape[-1] - 1].unflatten(0, (count, -1))
        return [
            self._loss(*one, half)
            for one in zip(states, labels[..., 1:], heads(self.model, count), before, strict=True)
        ]

    def _loss(
        self, states: Tensor, wanted: Tensor, head: Tensor, before: Tensor | None, half: int
    ) -> Tensor:
        """Of one job; ``before`` are the base's last hidden states of its general text."""
        arm = self.arm
        kept, own = _predicting(states[:half], wanted[:half])
        loss = _mean(kept @ head.T, own)
        if arm.general is None:
            return loss
        kept, general = _predicting(states[half:], wanted[half:])
        if arm.general == "replay":
            return loss + arm.general_weight * _mean(kept @ head.T, general)
        with torch.no_grad():
            expected, _ = _predicting(cast(Tensor, before), wanted[half:])
            (base_head,) = heads(self.lab.base, 1)
            expected = (expected @ base_head.T).log_softmax(-1)
        divergence = functional.kl_div(
            (kept @ head.T).log_softmax(-1), expected, reduction="none", log_target=True
        ).sum(-1)
        labelled = general != -100
        return loss + arm.general_weight * (divergence * labelled).sum() / labelled.sum()

    def _step(self) -> None:
        torch.stack(self._losses()).sum().backward()
        if len(self.jobs) > 1:
            for i, part in enumerate(self.parts):
                for own, stacked in zip(part, self.parameters, strict=True):
                    own.grad = cast(Tensor, stacked.grad)[i]
        for part in self.parts:
            nn.utils.clip_grad_norm_(part, 1.0, foreach=True)
        rates = self.rates[self.step_number][0]
        if self.lab.device.type == "cuda":
            self.rate.copy_(rates)
        else:
            for group, rate in zip(self.optimizer.param_groups, rates.tolist(), strict=True):
                group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None
        self.step_number += 1

    def capture(self) -> None:
        """Make the step a CUDA graph; what its rehearsals trained is undone."""
        saved = [p.detach().clone() for p in self.parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self._step()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.step_number.zero_()

    def advance(self) -> None:
        """One step; on a GPU it is only asked for."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    @torch.no_grad()
    def _merge(self, scale: float, final: list[Tensor]) -> None:
        """So much of the update: of all parameters where all are trained."""
        if self.initial is not None:
            for parameter, start, value in zip(self.parameters, self.initial, final, strict=True):
                parameter.copy_(start + scale * (value - start))
            return
        for module in self.model.modules():
            if isinstance(module, UpdatedLinear):
                module.share = scale
            elif isinstance(module, Stacked):
                module.merge(scale)

    def finish(self) -> list[dict[str, Any]]:
        """The figures of every scale of the update, of each job."""
        self.graph = None
        final = [p.detach().clone() for p in self.parameters]
        points: list[list[dict[str, float]]] = [[] for _ in self.jobs]
        for scale in SCALES:
            self._merge(scale, final)
            measured = self.lab.measure(self.model, self.task, len(self.jobs))
            for own, figures in zip(points, measured, strict=True):
                own.append({"scale": scale} | figures)
        shared = {
            "trained": sum(p.numel() for p in self.parameters) // len(self.jobs),
            "before": self.lab.before[self.task],
        }
        predicted = self._predicted_damage()  # by now of the whole update
        if predicted is None:
            return [shared | {"points": own} for own in points]
        return [
            shared | {"points": own, "predicted": _digits(damage)}
            for own, damage in zip(points, predicted, strict=True)
        ]

    @torch.no_grad()
    def _predicted_damage(self) -> Tensor | None:
        """``½ sum_j s_j delta_j^T E[x x^T] delta_j`` over all rows of linear layers, by job.

        Row j moves by delta_j; s and x are of the model's samples. None where they are not measured
        for all that is trained.
        """
        moments, count = self.lab.moments.get("samples"), len(self.jobs)
        damages = torch.zeros(count, device=self.lab.device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # products with the unit matrix are exact
        try:
            for name, linear in linears(self.lab.base).items():
                layer = self.model.get_submodule(name)
                if layer is linear or not _is_trained(layer):
                    continue
                if moments is None or name not in moments.sensitivity:
                    return None
                unit = torch.eye(linear.in_features, device=self.lab.device)
                weights = layer(unit.repeat(count, 1)).unflatten(0, (count, -1)).mT
                moved = (weights - linear(unit).T) @ moments.vectors[name]
                by_row = (moved.square() * moments.values[name]).sum(-1)
                damages += 0.5 * (by_row * moments.sensitivity[name]).sum(-1)
        finally:
            torch.set_float32_matmul_precision(precision)
        return damages


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _predicting(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """``[places, hidden]`` and ``[places]``: all of them, on a CPU those that predict a label."""
    if states.device.type == "cpu":
        return states[wanted != -100], wanted[wanted != -100]
    return states.flatten(0, 1), wanted.flatten()


def _mean(logits: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(logits, wanted, reduction="sum") / (wanted != -100).sum()


def train(jobs: Sequence[Job], lab: Laboratory) -> list[dict[str, Any]]:
    """The figures of jobs of one arm, task and number of steps, trained as one model."""
    run = Run(jobs, lab)
    if lab.device.type == "cuda":
        run.capture()
    for _ in range(jobs[0].steps):
        run.advance()
    return run.finish()
