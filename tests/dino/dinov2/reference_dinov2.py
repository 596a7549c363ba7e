"""A second, deliberately plain DINOv2 trainer: stock `Dinov2Model`, loops over views, pairs and masked patches."""

import copy

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from ..reference_dino import ReferenceHead, ReferenceTrainer
from .test_losses import naive_koleo, naive_sinkhorn


class ReferenceDinov2(nn.Module):
    def __init__(self, config: Dinov2Config, out_dim, hidden, bottleneck):
        super().__init__()
        self.backbone = Dinov2Model(config)
        self.cls_head = ReferenceHead(config.hidden_size, out_dim, hidden, bottleneck)
        self.patch_head = ReferenceHead(config.hidden_size, out_dim, hidden, bottleneck)

    def forward(self, crops, masks=None):
        """CLS and patch tokens of one view."""
        tokens = self.backbone(crops, bool_masked_pos=masks).last_hidden_state
        return tokens[:, 0], tokens[:, 1:]

    def load_ours(self, branch):
        self.backbone.load_state_dict(branch.backbone.state_dict())
        for mine, ours in ((self.cls_head, branch.head), (self.patch_head, branch.patch_head)):
            for number, layer in ((0, mine.a), (2, mine.b), (4, mine.c)):
                layer.load_state_dict(ours.mlp[number].state_dict())
            with torch.no_grad():
                mine.v.copy_(ours.last_layer.parametrizations.weight.original1)

    def difference(self, branch) -> float:
        other = copy.deepcopy(self)
        other.load_ours(branch)
        return max((a - b).abs().max().item() for a, b in zip(self.parameters(), other.parameters(), strict=True))


class ReferenceDinov2Trainer(ReferenceTrainer):
    """AdamW and EMA as in `ReferenceTrainer`; `centering` "sinkhorn_knopp" or "centering"."""

    def __init__(self, student, teacher, out_dim, schedule, centering):
        super().__init__(student, teacher, out_dim, schedule)
        self.centering = centering
        self.centers = {name: torch.zeros(out_dim, dtype=torch.float64) for name in ("cls", "patch")}
        self.parts = []

    def targets(self, name, logits, temperature):
        if self.centering == "sinkhorn_knopp":
            return naive_sinkhorn(logits, temperature)
        return ((logits - self.centers[name]) / temperature).softmax(-1)

    def step(self, step, micro_batches):
        lr, wd, momentum, temperature, frozen = self.schedule(step)
        self.student.zero_grad()
        losses, seen = [], {"cls": [], "patch": []}
        for views, masks in micro_batches:  # (B, C, H, W) each, two global views first; (B, N) of these two
            with torch.no_grad():
                teacher = [self.teacher(view) for view in views[:2]]
                cls_logits = torch.cat([self.teacher.cls_head(cls) for cls, _ in teacher])
                places = [(v, b, n) for v in range(2) for b, n in masks[v].nonzero().tolist()]
                if places:
                    patch_logits = torch.stack(
                        [self.teacher.patch_head(teacher[v][1][b, n][None])[0] for v, b, n in places]
                    )
                    patch_targets = self.targets("patch", patch_logits, temperature)
                    seen["patch"] += list(patch_logits)
                cls_targets = self.targets("cls", cls_logits, temperature).chunk(2)
                seen["cls"] += list(cls_logits)
            student = [self.student(view, masks[v] if v < 2 else None) for v, view in enumerate(views)]
            dino = []
            for q in range(2):
                for v in range(len(views)):
                    if v != q:
                        log_p = (self.student.cls_head(student[v][0]) / 0.1).log_softmax(-1)
                        dino.append(-(cls_targets[q] * log_p).sum(-1).mean())
            ibot = torch.zeros((), dtype=torch.float64)
            for (v, b, n), target in zip(places, patch_targets if places else [], strict=True):
                log_p = (self.student.patch_head(student[v][1][b, n][None])[0] / 0.1).log_softmax(-1)
                ibot = ibot - (target * log_p).sum() / masks[v][b].sum() / (2 * len(views[0]))
            koleo = naive_koleo(student[0][0]) + naive_koleo(student[1][0])
            loss = sum(dino) / len(dino) + ibot + 0.1 * koleo
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
            self.parts.append((sum(dino).item() / len(dino), ibot.item(), koleo.item()))
        self._adamw(lr, wd, frozen)
        for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            t.data = momentum * t.data + (1 - momentum) * s.data
        for name, rows in seen.items():
            if rows:
                self.centers[name] = 0.9 * self.centers[name] + 0.1 * torch.stack(rows).mean(0)
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _adamw(self, lr, wd, frozen):
        # the parent knows one frozen matrix by its name
        if frozen:
            for head in (self.student.cls_head, self.student.patch_head):
                head.v.grad = None
        names = {name: p for name, p in self.student.named_parameters() if p.grad is not None}
        norm = sum(p.grad.pow(2).sum().item() for p in names.values()) ** 0.5
        scale = min(1.0, self.max_norm / (norm + 1e-6))
        for name, p in names.items():
            m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            count = self.updates.get(name, 0) + 1
            gradient = p.grad * scale
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            if not (name.endswith("bias") or p.ndim == 1):
                p.mul_(1 - lr * wd)
            p.sub_(lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8))
            self.moments[name], self.updates[name] = (m, v), count
