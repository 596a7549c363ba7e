"""A second, deliberately plain DINO trainer: stock `ViTModel`, a loop over views and pairs, EMA and AdamW by hand."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel


class ReferenceHead(nn.Module):
    def __init__(self, dim, out_dim, hidden, bottleneck):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.v = nn.Parameter(torch.empty(out_dim, bottleneck))

    def forward(self, x):
        x = self.c(F.gelu(self.b(F.gelu(self.a(x)))))
        x = x / x.norm(dim=-1, keepdim=True)
        return x @ (self.v / self.v.norm(dim=1, keepdim=True)).t()


class ReferenceNet(nn.Module):
    def __init__(self, config: ViTConfig, out_dim, hidden, bottleneck):
        super().__init__()
        self.backbone = ViTModel(config, add_pooling_layer=False)
        self.head = ReferenceHead(config.hidden_size, out_dim, hidden, bottleneck)

    def forward(self, crops):
        tokens = self.backbone(crops, interpolate_pos_encoding=True).last_hidden_state
        return self.head(tokens[:, 0])

    def load_ours(self, branch):
        """Copy the weights of one of our branches."""
        self.backbone.load_state_dict(branch.backbone.state_dict())
        head = branch.head
        for ours, mine in ((head.mlp[0], self.head.a), (head.mlp[2], self.head.b), (head.mlp[4], self.head.c)):
            mine.load_state_dict(ours.state_dict())
        with torch.no_grad():
            self.head.v.copy_(head.last_layer.parametrizations.weight.original1)

    def difference(self, branch) -> float:
        """Largest absolute difference from the weights of one of our branches."""
        other = copy.deepcopy(self)
        other.load_ours(branch)
        pairs = zip(self.parameters(), other.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)


class ReferenceTrainer:
    """`schedule(step)` gives lr, weight decay, teacher momentum and temperature, and whether prototypes are frozen."""

    def __init__(self, student: ReferenceNet, teacher: ReferenceNet, out_dim, schedule, max_norm=3.0):
        self.student, self.teacher, self.schedule, self.max_norm = student, teacher, schedule, max_norm
        self.center = torch.zeros(1, out_dim, dtype=torch.float64)
        self.moments = {}
        self.updates = {}

    def step(self, step, micro_batches):
        lr, wd, momentum, temperature, frozen = self.schedule(step)
        self.student.zero_grad()
        losses, teacher_outputs = [], []
        for views in micro_batches:  # list of (B, C, H, W), two global views first
            with torch.no_grad():
                teacher = [self.teacher(v) for v in views[:2]]
            student = [self.student(v) for v in views]
            terms = []
            for q in range(2):
                target = ((teacher[q] - self.center) / temperature).softmax(-1)
                for v in range(len(views)):
                    if v != q:
                        terms.append(-(target * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean())
            loss = sum(terms) / len(terms)
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
            teacher_outputs += teacher
        self._adamw(lr, wd, frozen)
        for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            t.data = momentum * t.data + (1 - momentum) * s.data
        self.center = 0.9 * self.center + 0.1 * torch.cat(teacher_outputs).mean(0, keepdim=True)
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _adamw(self, lr, wd, frozen):
        active = {n: p for n, p in self.student.named_parameters() if not (frozen and n == "head.v")}
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in active.values()))
        scale = min(1.0, self.max_norm / (norm + 1e-6))
        for name, p in active.items():
            m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            count = self.updates.get(name, 0) + 1
            gradient = p.grad * scale
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            if not (name.endswith("bias") or p.ndim == 1):
                p.mul_(1 - lr * wd)
            p.sub_(lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8))
            self.moments[name], self.updates[name] = (m, v), count
