# SPDX-License-Identifier: Apache-2.0
import math
import socket

import pytest
import torch
import torch.multiprocessing

from hf_simprune.errors import InputError
from hf_simprune.reduction import ReductionSetting, SimPruneDynamicReducer, token_counts
from hf_simprune.reduction.simprune_dynamic import outside_window, select_by_gates


LAYERS, DEPTH, WIDTH = (1, 3, 4), 6, 16
SETTING = ReductionSetting(LAYERS, DEPTH, WIDTH, 2, num_prefix=1)


def build(keep_rate=0.8, seed=0, **options):
    torch.manual_seed(seed)
    reducer = SimPruneDynamicReducer(keep_rate, SETTING, **options)
    return reducer, reducer.build_learned().train()


def views(count, images=3, seed=0, rows=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows or 2 * images, count, WIDTH, generator=generator).to(dtype)


# The naive method: plain loops over rows and tokens.


def naive_logits(tokens, gate):
    weight, bias = gate.linear.weight.detach()[0].tolist(), gate.linear.bias.item()
    rows = []
    for row in tokens.tolist():
        logits = []
        for token in row:
            mean = sum(token) / WIDTH
            deviation = math.sqrt(sum((x - mean) ** 2 for x in token) / WIDTH + 1e-5)
            normed = [(x - mean) / deviation for x in token]
            pooled = [sum(normed[4 * g : 4 * g + 4]) / 4 for g in range(WIDTH // 4)]
            logits.append(10 * (sum(w * x for w, x in zip(weight, pooled, strict=True)) + bias))
        rows.append(logits)
    return rows


def cosine(a, b):
    return (torch.dot(a, b) / (a.norm() * b.norm())).item()


def naive_ranks(scores):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [order.index(i) for i in range(len(scores))]


def round_to_four(value):
    return 4 * math.floor(value / 4 + 0.5)


def naive_choice(scores, logits, progress):
    """Per row the kept tokens, and K; scores and logits are lists of rows."""
    count = len(scores[0])
    always = count - count // 2
    offset = round(progress * (count - always))
    outside, wanted = [], 0
    for row, wish in zip(scores, logits, strict=True):
        ranks = naive_ranks(row)
        distance = {}
        for i, rank in enumerate(ranks):
            if rank < offset:
                distance[i] = offset - rank
            elif rank >= offset + always:
                distance[i] = rank - (offset + always - 1)
        outside.append(distance)
        wanted += sum(wish[i] > 0 for i in distance)
    keep = min(max(round_to_four(always + wanted / len(scores)), always), count)
    kept = []
    for distance, wish in zip(outside, logits, strict=True):
        best = sorted(distance, key=lambda i: (-wish[i], distance[i], i))[: keep - always]
        kept.append(sorted([i for i in range(count) if i not in distance] + best))
    return kept, keep


def naive_teacher(similarity, kept, keep, progress, matching):
    """The teacher's kept tokens of one row, from cosines (student, teacher)."""
    count = len(similarity)
    offset = round(progress * (count - keep))
    best = [max(similarity[i][j] for i in range(count)) for j in range(count)]
    ranks = naive_ranks(best)
    if matching == "symmetric":
        return [j for j in range(count) if offset <= ranks[j] < offset + keep]
    pruned = [i for i in range(count) if i not in kept]
    votes = {max(range(count), key=lambda j: (similarity[i][j], -j)) for i in pruned}

    def urgency(j):
        back = max(range(count), key=lambda i: (similarity[i][j], -i))
        edge = max(offset - ranks[j], ranks[j] - (offset + keep - 1))
        return (-(j in votes), -(back in pruned), -edge, j)

    # vote and match weigh 4 and 2, so a vote always wins over a match, and a match over any edge
    leaving = sorted(range(count), key=urgency)[: count - keep]
    return [j for j in range(count) if j not in leaving]


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
@pytest.mark.parametrize(
    ("count", "progress", "init"), [(20, 0.0, 0.0), (13, 0.5, -1.0), (9, 1.0, 1.0), (24, 0.3, 0.5)]
)
def test_global_views_equal_a_naive_loop(matching, count, progress, init):
    reducer, gates = build(matching=matching, gate_init=init, seed=count)
    student, teacher = views(count, seed=1), views(count, seed=2)
    found = reducer.pair(student, teacher, torch.tensor(progress), 1, gates)
    images = len(student) // 2
    similarity = [
        [[cosine(s, t) for t in teacher[(row + images) % (2 * images)]] for s in student[row]]
        for row in range(2 * images)
    ]
    scores = [[max(row) for row in pair] for pair in similarity]
    kept, keep = naive_choice(scores, naive_logits(student, gates.gates[1]), progress)
    assert found.student.tolist() == kept
    for row in range(2 * images):
        expected = naive_teacher(similarity[row], kept[row], keep, progress, matching)
        assert found.teacher[(row + images) % (2 * images)].tolist() == expected


@pytest.mark.parametrize(("count", "progress"), [(9, 0.0), (12, 0.6), (7, 1.0)])
def test_local_crops_equal_a_naive_loop(count, progress):
    reducer, gates = build(seed=3)
    local, teacher = views(count, rows=4, seed=4), views(16, images=2, seed=5)
    found = reducer.local(local, teacher, torch.tensor(progress), 2, gates)
    scores = [
        [sum(max(cosine(x, t) for t in teacher[row % 2 + 2 * view]) for view in (0, 1)) / 2 for x in local[row]]
        for row in range(4)
    ]
    kept, _ = naive_choice(scores, naive_logits(local, gates.gates[2]), progress)
    assert found.indices.tolist() == kept


def test_k_is_a_multiple_of_four_within_its_bounds():
    for count in (3, 5, 8, 17, 36, 49):
        always = count - count // 2
        for init in (-50.0, 0.0, 50.0):
            reducer, gates = build(gate_init=init)
            tokens = views(count)
            keep = reducer.pair(tokens, tokens.flip(1), torch.tensor(0.5), 0, gates).student.shape[1]
            assert always <= keep <= count
            assert keep % 4 == 0 or keep in (always, count)
            if init:
                wanted = always if init < 0 else count
                assert keep == min(max(round_to_four(wanted), always), count)


@pytest.mark.parametrize(
    ("offset", "keep", "expected"),
    [
        (0, 7, [0, 1, 2, 3, 4, 5, 6]),  # nearest to the window first
        (2, 6, [1, 2, 3, 4, 5, 6]),  # ranks 1 and 6 are as near
        (2, 5, [1, 2, 3, 4, 5]),  # the lower index of both
        (4, 6, [2, 3, 4, 5, 6, 7]),
    ],
)
def test_equal_gates_stay_by_their_distance_from_the_window(offset, keep, expected):
    scores = torch.linspace(1, 0, 8).repeat(2, 1)
    logits = torch.tensor([[-1.0] * 8, [3.0] * 8])
    edge = outside_window(scores, 4, torch.tensor(offset))
    kept, dropped = select_by_gates(edge, logits, keep)
    assert kept.tolist() == [expected] * 2
    assert dropped.sort(1).values.tolist() == [[i for i in range(8) if i not in expected]] * 2


def test_kept_candidates_carry_the_gates_gradient_and_no_value():
    reducer, gates = build(seed=7)
    student, teacher = views(24, seed=8).requires_grad_(), views(24, seed=9)
    found = reducer.pair(student, teacher, torch.tensor(0.4), 0, gates)
    assert torch.equal(found.factors, torch.ones_like(found.factors))
    upstream = torch.randn(found.factors.shape, generator=torch.Generator().manual_seed(1))
    (found.factors * upstream).sum().backward()
    logits = torch.tensor(naive_logits(student.detach(), gates.gates[0]))
    ranks = [naive_ranks(row) for row in best_cosines(student.detach(), teacher)]
    expected = 0.0
    for row, kept in enumerate(found.student.tolist()):
        for place, token in enumerate(kept):
            if not 5 <= ranks[row][token] < 17:  # N = 24: a window of 12 from round(0.4 * 12) on
                gate = torch.sigmoid(logits[row, token]).item()
                expected += upstream[row, place].item() * gate * (1 - gate) * 10
    assert gates.gates[0].linear.bias.grad.item() == pytest.approx(expected, rel=1e-3)
    assert expected != 0 and student.grad is None


def best_cosines(student, teacher):
    images = len(student) // 2
    others = [teacher[(row + images) % len(student)] for row in range(len(student))]
    return [[max(cosine(s, t) for t in other) for s in row] for row, other in zip(student, others, strict=True)]


def walk(reducer, gates, seed=0, progress=0.5, local=True, sizes=(32, 16), common=None):
    """A pass without a network: fresh tokens at every stage. Returns the counts of both crop sizes."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.zeros(len(LAYERS), WIDTH) if common is None else common
    counts, small = [sizes[0]], [sizes[1]]
    seen = []
    for stage in range(len(LAYERS)):
        student = torch.randn(8, counts[-1], WIDTH, generator=generator) + common[stage]
        seen.append(student + 0.5 * torch.randn(8, counts[-1], WIDTH, generator=generator))
        counts.append(reducer.pair(student, seen[-1], torch.tensor(progress), stage, gates).student.shape[1])
    for stage in range(len(LAYERS) if local else 0):
        tokens = torch.randn(12, small[-1], WIDTH, generator=generator) + common[stage]
        small.append(reducer.local(tokens, seen[stage], torch.tensor(progress), stage, gates).indices.shape[1])
    return counts, small


def naive_macs(counts):
    total, tokens, stage = 0, counts[0] + 1, 0
    for block in range(DEPTH):
        total += 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
        if block in LAYERS:
            stage += 1
            tokens = counts[stage] + 1
        total += 8 * tokens * WIDTH**2
    return total


def naive_share(counts, small, rows=(8, 12)):
    """A global row costs four passes (student forward and backward, teacher), a local one three."""
    spent = 4 * rows[0] * naive_macs(counts)
    dense = 4 * rows[0] * naive_macs([counts[0]] * 4)
    if len(small) > 1:
        spent += 3 * rows[1] * naive_macs(small)
        dense += 3 * rows[1] * naive_macs([small[0]] * 4)
    return spent / dense


@pytest.mark.parametrize("local", [True, False])
def test_the_budget_loss_is_the_squared_distance_of_the_shares(local):
    reducer, gates = build(0.7, budget_weight=3.0, gate_init=1.0)
    counts, small = walk(reducer, gates, local=local)
    loss = reducer.take_auxiliary_loss()
    target = naive_share(token_counts(32, 0.7, 3), token_counts(16, 0.7, 3) if local else [16])
    assert loss.item() == pytest.approx(3 * (naive_share(counts, small) - target) ** 2, rel=1e-4)
    assert reducer.take_auxiliary_loss() is None


def test_the_budget_gradient_is_that_of_the_soft_counts():
    reducer, gates = build(0.6, budget_weight=2.0, gate_init=0.5)
    student, teacher = views(32, seed=1, rows=8), views(32, seed=2, rows=8)
    counts = [32]
    for stage in range(3):
        tokens = (student[:, : counts[-1]], teacher[:, : counts[-1]])
        counts.append(reducer.pair(*tokens, torch.tensor(0.0), stage, gates).student.shape[1])
    reducer.take_auxiliary_loss().backward()
    distance = naive_share(counts, []) - naive_share(token_counts(32, 0.6, 3), [])
    for stage in range(3):
        step = 1e-3
        up, down = list(counts), list(counts)
        up[stage + 1], down[stage + 1] = counts[stage + 1] + step, counts[stage + 1] - step
        slope = (naive_share(up, []) - naive_share(down, [])) / (2 * step)
        before = counts[stage]
        logits = naive_logits(student[:, :before], gates.gates[stage])
        ranks = [naive_ranks(row) for row in best_cosines(student[:, :before], teacher[:, :before])]
        moved = 0.0
        for row in range(8):
            for token in range(before):
                if ranks[row][token] >= before - before // 2:
                    gate = 1 / (1 + math.exp(-logits[row][token]))
                    moved += gate * (1 - gate) * 10 / 8
        expected = 2 * 2.0 * distance * slope * moved
        assert gates.gates[stage].linear.bias.grad.item() == pytest.approx(expected, rel=2e-3)


def test_passes_without_training_leave_no_loss():
    reducer, gates = build()
    walk(reducer, gates.eval())
    assert reducer.take_auxiliary_loss() is None
    walk(reducer, gates.train(), seed=1)
    first = reducer.take_auxiliary_loss()
    walk(reducer, gates)  # a pass whose loss nobody took
    walk(reducer, gates, seed=1)
    assert torch.equal(reducer.take_auxiliary_loss(), first)


@pytest.mark.parametrize("init", [-2.0, 2.0])
def test_the_compute_target_is_reached_from_both_sides(init):
    reducer, gates = build(0.8, gate_init=init)
    target = naive_share(token_counts(64, 0.8, 3), [0])
    common = 0.5 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(gates.parameters(), lr=6e-3)
    shares, kept = [], []
    for step in range(100):
        counts, _ = walk(reducer, gates, seed=step, progress=step / 100, local=False, sizes=(64, 0), common=common)
        optimizer.zero_grad()
        reducer.take_auxiliary_loss().backward()
        optimizer.step()
        shares.append(naive_share(counts, [0]))
        kept.append([after / before for before, after in zip(counts[:-1], counts[1:], strict=True)])
    assert abs(shares[0] - target) > 0.15
    assert abs(sum(shares[-40:]) / 40 - target) < 0.03
    rates = torch.tensor(kept[-40:]).mean(0)
    assert rates.max() - rates.min() > 0.05  # the stages found rates of their own


def test_a_keep_rate_of_one_prunes_and_learns_nothing():
    reducer = SimPruneDynamicReducer(1.0, SETTING)
    assert reducer.build_learned() is None
    tokens = views(9)
    found = reducer.pair(tokens, tokens, torch.tensor(0.5))
    assert torch.equal(found.student, torch.arange(9).expand(6, 9)) and found.factors is None
    assert torch.equal(found.teacher, found.student)
    assert torch.equal(reducer.local(tokens, tokens, torch.tensor(0.5)).indices, found.student)
    assert reducer.take_auxiliary_loss() is None and reducer.overhead_macs(0, 196) == 0


def test_bf16_tokens_are_scored_in_fp32():
    reducer, gates = build()
    student, teacher = views(24, seed=1, dtype=torch.bfloat16), views(24, seed=2, dtype=torch.bfloat16)
    coarse = reducer.pair(student, teacher, torch.tensor(0.3), 0, gates)
    with torch.autocast("cpu", torch.bfloat16):
        cast = reducer.pair(student.float(), teacher.float(), torch.tensor(0.3), 0, gates)
    fine = reducer.pair(student.float(), teacher.float(), torch.tensor(0.3), 0, gates)
    assert coarse.factors.dtype == torch.bfloat16
    assert torch.equal(coarse.student, fine.student) and torch.equal(coarse.teacher, fine.teacher)
    assert torch.equal(cast.student, fine.student) and torch.equal(cast.teacher, fine.teacher)


def test_the_gate_costs_a_quarter_of_the_width_a_token():
    assert SimPruneDynamicReducer(0.8, ReductionSetting((3,), 12, 384)).overhead_macs(0, 196) == 196 * 96


@pytest.mark.parametrize(
    ("keep_rate", "options", "message"),
    [
        (0.4, {}, "keep_rate 0.4.*half.*0.5 or more"),
        (0.8, {"budget_weight": -1.0}, "budget_weight -1.0.*0 or more"),
        (0.8, {"gate_init": float("nan")}, "gate_init nan.*number"),
        (0.8, {"matching": "both"}, "matching 'both'.*one_way"),
    ],
)
def test_bad_options_are_refused(keep_rate, options, message):
    with pytest.raises(InputError, match=message):
        SimPruneDynamicReducer(keep_rate, SETTING, **options)


def _rank(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    reducer, gates = build(gate_init=0.0)
    # one rank's images want to stay more than the other's
    gates.gates[0].linear.bias.data += 0.15 if rank else -0.15
    student = views(40, seed=rank)
    alone = reducer.pair(student, student.flip(0), torch.tensor(0.2), 0, gates.eval()).student.shape[1]
    together = reducer.pair(student, student.flip(0), torch.tensor(0.2), 0, gates.train())
    torch.save((alone, together.student.shape[1]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_processes_keep_as_many(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    (alone_0, both_0), (alone_1, both_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert alone_0 < both_0 == both_1 < alone_1
