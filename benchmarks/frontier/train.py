"""Training an arm and measuring it; on a GPU a step is a CUDA graph, and several run at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arms import Arm
from .data import DOMAINS, TASKS, Data
from .layers import FactoredLinear, OrthogonalSubspaceLinear, UpdatedLinear, start_of
from .moments import Moments, linears, projection, rank_of

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
        self._states = {name: self._hidden(self.base, name)[0] for name in DOMAINS}
        self.before = {task: self.loss(self.base, task) for task in TASKS}

    @torch.no_grad()
    def _hidden(self, model: Any, name: str) -> tuple[Tensor, Tensor]:
        """Last hidden states of the places that predict a label, ``[tokens, hidden]``, and it.

        Sequences of like length go together, and nothing runs behind their last label.
        """
        ids, labels = self.data.ids[name], self.data.labels[name]
        places = torch.arange(ids.shape[1], device=ids.device)
        ends = ((labels != -100) * places).amax(1)
        states, wanted = [], []
        for chosen in ends.argsort(stable=True).split(16):
            end = int(ends[chosen[-1]])
            hidden = model.model(input_ids=ids[chosen, :end], use_cache=False).last_hidden_state
            following = labels[chosen, 1 : end + 1]
            states.append(hidden[following != -100])
            wanted.append(following[following != -100])
        return torch.cat(states), torch.cat(wanted)

    @torch.no_grad()
    def loss(self, model: Any, task: str) -> float:
        """Nats a token of a task's held-out texts."""
        head = model.get_output_embeddings().weight
        states, wanted = self._hidden(model, f"{task}/test")
        loss, size = torch.zeros((), device=self.device), min(2048, _LOGITS // len(head))
        for part, target in zip(states.split(size), wanted.split(size), strict=True):
            loss += functional.cross_entropy(part @ head.T, target, reduction="sum")
        return _digits(loss / len(wanted))

    @torch.no_grad()
    def measure(self, model: Any, task: str) -> dict[str, float]:
        """Nats a token: the task's held-out loss, and each domain's KL from the base."""
        figures = {"loss": self.loss(model, task)}
        head, base_head = (m.get_output_embeddings().weight for m in (model, self.base))
        size = min(2048, _LOGITS // len(head))
        for domain in DOMAINS:
            states, total = self._hidden(model, domain)[0], torch.zeros((), device=self.device)
            for part, before in zip(
                states.split(size), self._states[domain].split(size), strict=True
            ):
                q = (part @ head.T).log_softmax(-1)
                p = (before @ base_head.T).log_softmax(-1)
                total += functional.kl_div(q, p, reduction="sum", log_target=True)
            figures[domain] = _digits(total / len(states))
        return figures


def _digits(value: Tensor) -> float:
    return float(f"{float(value):.6g}")


class Run:
    """A job's model, optimizer and step."""

    def __init__(self, job: Job, lab: Laboratory) -> None:
        self.job, self.lab = job, lab
        self.model = copy.deepcopy(lab.base)
        self.generator = torch.Generator().manual_seed(1000 + job.seed)
        self.parameters = self._prepare()
        self.initial = [p.detach().clone() for p in self.parameters] if job.arm.whole else None
        device = lab.device
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.rate if device.type == "cuda" else 0.0,
            weight_decay=0.0,
            fused=True,
            capturable=device.type == "cuda",
        )
        warm = max(1, job.steps // 10)
        factors = [
            min((i + 1) / warm, (job.steps - i) / (job.steps - warm + 1)) for i in range(job.steps)
        ]
        self.rates = torch.tensor([job.rate * f for f in factors], device=device)
        self.order = self._order().to(device)
        self.step_number = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _prepare(self) -> list[nn.Parameter]:
        arm, lab = self.job.arm, self.lab
        self.model.requires_grad_(arm.whole)
        layers = linears(self.model)
        names = list(layers)
        rows_generator = torch.Generator().manual_seed(77 + self.job.seed)
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
            mask = None
            if protected:
                moments = lab.moments[arm.moments]
                other = name
                if arm.protect == "other":  # the same matrix, seven layers on
                    alike = [n for n in names if n.rpartition(".")[2] == part]
                    other = alike[(alike.index(name) + 7) % len(alike)]
                values, vectors = moments.values[other], moments.vectors[other]
                rank = rank_of(values, arm.share, arm.directions)
                number = 10_000 * self.job.seed + names.index(name)
                mask = projection(cast(str, arm.protect), values, vectors, rank, number)
            rows = None
            if arm.quota < 100:
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
            linear.weight.requires_grad_(False)
            parent, _, attribute = name.rpartition(".")
            layer: UpdatedLinear
            if arm.start == "svd":
                layer = OrthogonalSubspaceLinear(linear)
            else:
                start = None
                if arm.start is not None:
                    moments = lab.moments[arm.moments]
                    values, vectors = moments.values[name], moments.vectors[name]
                    start = start_of(arm.start, linear.weight, values, vectors, cast(int, arm.rank))
                layer = FactoredLinear(linear, rows, scale, arm.rank, mask, self.generator, start)
                if arm.fixed_factor:
                    cast(nn.Parameter, layer.factor).requires_grad_(False)
            setattr(self.model.get_submodule(parent), attribute, layer)
        return [p for p in self.model.parameters() if p.requires_grad]

    def _order(self) -> Tensor:
        """The sequences of each step, ``[steps, batch]``: of the task, then of general text."""
        half = BATCH // 2 if self.job.arm.general else BATCH
        counts = [(len(self.lab.data.ids[f"{self.job.task}/train"]), half)]
        if self.job.arm.general:
            counts.append((len(self.lab.data.ids[self.job.arm.source]), BATCH - half))
        columns = []
        for available, each in counts:
            wanted = each * self.job.steps
            drawn = [
                torch.randperm(available, generator=self.generator)
                for _ in range(math.ceil(wanted / available))
            ]
            columns.append(torch.cat(drawn)[:wanted].view(self.job.steps, each))
        return torch.cat(columns, 1)

    def _loss(self) -> Tensor:
        order = self.order[self.step_number][0]
        half = BATCH // 2 if self.job.arm.general else BATCH
        data, arm = self.lab.data, self.job.arm
        ids = data.ids[f"{self.job.task}/train"][order[:half]]
        labels = data.labels[f"{self.job.task}/train"][order[:half]]
        if arm.general:
            ids = torch.cat([ids, data.ids[arm.source][order[half:]]])
            labels = torch.cat([labels, data.labels[arm.source][order[half:]]])
        if self.lab.device.type == "cpu":  # a captured step's shapes are fixed, these are not
            end = int((labels != -100).any(0).nonzero().max()) + 1
            ids, labels = ids[:, :end], labels[:, :end]
        states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        head, wanted = self.model.get_output_embeddings(), labels[:, 1:]
        kept, own = _predicting(states[:half], wanted[:half])
        loss = _mean(head(kept), own)
        if arm.general:
            kept, general = _predicting(states[half:], wanted[half:])
        if arm.general == "replay":
            loss = loss + arm.general_weight * _mean(head(kept), general)
        elif arm.general == "kl":
            with torch.no_grad():
                base = self.lab.base
                states = base.model(input_ids=ids[half:], use_cache=False).last_hidden_state
                before, _ = _predicting(states[:, :-1], wanted[half:])
                before = base.get_output_embeddings()(before).log_softmax(-1)
            divergence = functional.kl_div(
                head(kept).log_softmax(-1), before, reduction="none", log_target=True
            ).sum(-1)
            labelled = general != -100
            loss = loss + arm.general_weight * (divergence * labelled).sum() / labelled.sum()
        return loss

    def _step(self) -> None:
        loss = self._loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        rate = self.rates[self.step_number][0]
        if self.lab.device.type == "cuda":
            self.rate.copy_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = float(rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        self.step_number += 1

    def capture(self) -> None:
        """Make the step a CUDA graph; what its rehearsals trained is undone."""
        saved = [p.detach().clone() for p in self.parameters]
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        self.graph = graph
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.step_number.zero_()
        torch.cuda.synchronize()

    def advance(self) -> None:
        """One step; on a GPU it is only asked for."""
        if self.graph is None:
            self._step()
        else:
            with torch.cuda.stream(self.stream):
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

    def finish(self) -> dict[str, Any]:
        """The figures of every scale of the update."""
        self.graph = None
        final = [p.detach().clone() for p in self.parameters]
        points = []
        for scale in SCALES:
            self._merge(scale, final)
            points.append({"scale": scale} | self.lab.measure(self.model, self.job.task))
        return {
            "trained": sum(p.numel() for p in self.parameters),
            "before": self.lab.before[self.job.task],
            "points": points,
        }


def _predicting(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """``[places, hidden]`` and ``[places]``: all of them, on a CPU those that predict a label."""
    if states.device.type == "cpu":
        return states[wanted != -100], wanted[wanted != -100]
    return states.flatten(0, 1), wanted.flatten()


def _mean(logits: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(logits, wanted, reduction="sum") / (wanted != -100).sum()


def train(jobs: Sequence[Job], lab: Laboratory) -> Iterator[tuple[Job, dict[str, Any]]]:
    """All of them side by side, each on a stream of its own."""
    runs = [Run(job, lab) for job in jobs]
    if lab.device.type == "cuda":
        for run in runs:
            run.capture()
    for step in range(max(job.steps for job in jobs)):
        for run in runs:
            if step < run.job.steps:
                run.advance()
    if lab.device.type == "cuda":
        torch.cuda.synchronize()
    for run in runs:
        yield run.job, run.finish()
