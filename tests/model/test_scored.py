"""KNN softmax by scores: which classes it takes, and that parts of a batch change nothing else."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.heads import SEED, WORLDS, D, G, assert_like_dense, dense, examples, step
from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.config import Config
from xc.errors import UserError
from xc.knn.similar_parts import similar_parts
from xc.model.initial_rows import initial_rows
from xc.model.sampled import SampledHead
from xc.model.scored import ScoredKnnHead, near_parts

C, SCALE = 61, 7.0


def a_head(world, active=31, num_classes=C, **settings):
    settings = {"num_neighbors": 12, "near_share": 0.5, "graph": "exact", "near_parts": 4} | settings
    return ScoredKnnHead(num_classes, D, world, active_classes=active, seed=SEED, dtype=torch.float64, scale=SCALE,
                         **settings)


def dense_offsets(head, num_examples):
    """(num_examples, S) of this replica: what is added to the logit of each row; -inf: it is left out."""
    selection = head.selections[0]
    table = selection.offsets(slice(0, len(head.weight)), torch.float64)
    part_of = torch.zeros(len(selection.order) if selection.parts else num_examples, dtype=torch.int64)
    for i, part in enumerate(selection.parts):
        part_of[selection.order[part.examples]] = i
    return table[part_of]


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("logits_mb", [0.0, 1e-4])
@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_equals_the_dense_softmax_over_the_classes_of_each_part(world_size, model_parallel_size, parts, logits_mb):
    def body(world):
        head = a_head(world, near_parts=parts, logits_mb=logits_mb)
        loss, feature_grad, row_grad = step(head)
        rows = torch.zeros_like(head.weight).index_copy_(0, head.selection.active, row_grad)
        num_examples = sum(len(Shard.of(G, world.size, r)) for r in world.shard_ranks)
        mine = Shard.of(G, world.size, world.rank)
        quality = head.selection_quality(*(given[mine.first : mine.last] for given in examples(C)))
        return loss, feature_grad, rows, dense_offsets(head, num_examples), len(head.selection.active), quality

    ranks = run_ranks(world_size, body, model_parallel_size)
    copies = [ranks[i : i + model_parallel_size] for i in range(0, world_size, model_parallel_size)]
    offsets = torch.cat([torch.cat([r[3] for r in copy], 1) for copy in copies])  # examples of all copies
    features, labels = examples(C)
    features.requires_grad_()
    rows = initial_rows(Shard(0, C), D, SEED, torch.float64).requires_grad_()
    logits = SCALE * F.normalize(features) @ F.normalize(rows).T
    loss = F.cross_entropy(logits + offsets, labels)
    loss.backward()
    torch.testing.assert_close(ranks[0][0], loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), features.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([r[2] for r in copies[0]]), rows.grad, rtol=1e-9, atol=1e-11)
    per_example = (offsets > -torch.inf).sum(1)
    assert (per_example <= 31 + world_size).all() and (parts == 1 or ranks[0][4] * world_size > 31)
    assert ranks[0][5]["active_per_example"] == pytest.approx(per_example.double().mean().item())
    assert ranks[0][5]["active"] == sum(r[4] for r in copies[0]) <= C  # a class of two parts counts once
    gap = torch.logsumexp(logits + offsets, 1) - torch.logsumexp(logits, 1)
    assert ranks[0][5]["loss_gap"] == pytest.approx(gap.mean().item(), abs=1e-6)


@pytest.mark.parametrize("num_classes, correction", [(3, True), (37, True), (37, False)])
@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_all_classes_active_is_the_full_softmax(num_classes, correction, world_size, model_parallel_size):
    """Also with parts: the loss, and both gradients once the rows are in their own order."""
    def body(world):
        head = a_head(world, num_classes, num_classes, num_neighbors=min(12, num_classes - 1),
                      sampling_correction=correction, logits_mb=1e-4)
        loss, feature_grad, row_grad = step(head)
        rows = torch.zeros_like(head.weight).index_copy_(0, head.selection.active, row_grad)
        return loss, feature_grad, rows, head.shard

    assert_like_dense(run_ranks(world_size, body, model_parallel_size), dense(num_classes, True, SCALE, "none", 0.0))


@pytest.mark.parametrize("parts, active, near_share", [(1, 29, 0.5), (4, 29, 0.5), (1, 50, 0.2), (4, 50, 0.2)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_averaged_over_draws_partition_function_and_gradients_are_the_full_ones(world_size, parts, active, near_share):
    """Every number within 5 standard errors of the mean; the gradients of a fixed partition function, since that of
    the estimated one has the bias of 1 / Z that all sampled softmax has."""
    draws = 400
    features, labels = examples(C)
    unit, rows = F.normalize(features), F.normalize(initial_rows(Shard(0, C), D, SEED, torch.float64))
    logits = SCALE * unit @ rows.T
    full = logits.exp()
    part = full / full.sum(1, keepdim=True)

    def body(world):
        head, found = a_head(world, active, near_parts=parts, near_share=near_share), []
        for at in range(draws):
            mine = Shard.of(G, world.size, world.rank)
            if not at:
                head.refresh(at, due=True)
            head.select(labels[mine.first : mine.last], at)
            head(features[mine.first : mine.last], labels[mine.first : mine.last], G)
            assert torch.isin(labels[head.shard.owns(labels)] - head.shard.first, head.selection.active).all()
            found.append(dense_offsets(head, G).exp())  # 1 / π, or 0
        return torch.stack(found)

    weights = torch.cat(run_ranks(world_size, body), 2)  # (draws, G, C)
    for value, expected in [((weights * full).sum(2), full.sum(1)),
                            (torch.einsum("ngc,gc,cd->ngd", weights, part, rows),
                             part @ rows),
                            (torch.einsum("ngc,gc,gd->ncd", weights, part, unit), part.T @ unit)]:
        error = (value.mean(0) - expected).abs()
        assert (error < 5 * value.std(0) / draws**0.5 + 1e-9).all()
    assert (weights.std(0).sum(1) > 0).all()  # or the averages would prove nothing


@pytest.mark.parametrize("active, near_share", [(29, 0.2), (50, 0.2), (50, 0.5), (59, 0.5)])
def test_the_quota_is_filled_where_nearly_all_classes_are_candidates(active, near_share):
    def body(world):
        head = a_head(world, active, near_parts=1, near_share=near_share)
        _, labels = examples(C)
        targets = labels[head.shard.owns(labels)].unique()
        quota = max(head.quota, min(len(head.weight), len(targets) + 1))
        for at in range(20):
            step(head, at)
            assert len(head.selection.active.unique()) == len(head.selection.active) == quota

    for world_size in (1, 2, 3):
        run_ranks(world_size, body)


@pytest.mark.parametrize("parts", [1, 4])
def test_without_the_sampling_correction_it_never_exceeds_the_full_loss(parts):
    full = dense(C, True, SCALE, "none", 0.0)[0]
    for at in range(10):
        found = run_ranks(2, lambda w, at=at: step(a_head(w, sampling_correction=False, near_parts=parts), at))
        assert found[0][0] <= full


@pytest.mark.parametrize("parts", [1, 4])
def test_copies_of_the_classifier_choose_alike(parts):
    def body(world):
        head = a_head(world, near_parts=parts)
        loss, _, row_grad = step(head)
        return loss, row_grad, head.selection.active

    for one, two in zip(run_ranks(2, body) * 2, run_ranks(4, body, 2), strict=True):
        assert torch.equal(one[2], two[2])
        torch.testing.assert_close(one[:2], two[:2], rtol=1e-10, atol=1e-12)


def test_the_first_copy_decides_where_rounding_parts_them():
    def body(world):
        head = a_head(world)
        if world.replicas.rank == 1:
            of_class = head._scores
            head._scores = lambda *given: (*(found := of_class(*given))[:2], found[2].flip(0))
        _, _, row_grad = step(head)
        return head.selection.active, row_grad

    ranks = run_ranks(4, body, 2)
    for one, two in zip(ranks[:2], ranks[2:], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_near_classes_have_the_highest_probabilities_of_the_examples_of_their_part():
    """Where every class is a candidate, with one part and several, against the dense softmax."""
    features, labels = examples(C)
    rows = F.normalize(initial_rows(Shard(0, C), D, SEED, torch.float64))
    probability = (SCALE * F.normalize(features) @ rows.T).softmax(1)
    probability[:, labels] = -1
    for parts in (1, 2):
        head = a_head(World(), 31, num_neighbors=C - 1, near_parts=parts)
        step(head)
        part_of = similar_parts(F.normalize(features), parts)
        near = (31 - len(labels.unique())) // 2
        offsets = dense_offsets(head, G)
        for part in range(parts):
            best = probability[part_of == part].sum(0).topk(near).indices
            assert (offsets[part_of == part][:, best] == 0).all()


@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_scores_are_sums_of_the_probabilities_of_the_dense_softmax(world_size, model_parallel_size):
    """A shard has fewer rows than stand for all that are no candidates, so nothing is estimated."""
    features, labels = examples(C)
    unit = F.normalize(features)
    rows = F.normalize(initial_rows(Shard(0, C), D, SEED, torch.float64))
    probability, part_of = (SCALE * unit @ rows.T).softmax(1), similar_parts(unit, 2)

    def body(world):
        head = a_head(world, near_parts=2, num_neighbors=5)
        head.refresh(0, due=True)
        targets, candidates, scores = head._scores(unit, labels, part_of, 0)
        assert torch.equal(targets + head.shard.first, labels[head.shard.owns(labels)].unique())
        pairs, _, parts, classes, which = head._pairs(unit, labels, part_of)
        assert torch.equal(part_of[pairs], parts[which])
        expected = torch.zeros(2, len(head.weight), dtype=torch.float64).index_put_(
            (parts[which], classes[which]), probability[pairs, classes[which] + head.shard.first], accumulate=True)
        expected[:, targets] = 0
        for of_part, ids, its_scores in zip(expected, candidates, scores, strict=True):
            exists = ids < len(head.weight)
            found = torch.zeros_like(of_part).index_put_((ids[exists],), its_scores[exists])
            assert (ids[exists].diff() > 0).all() and (its_scores[~exists] == 0).all()
            torch.testing.assert_close(found, of_part, rtol=1e-9, atol=1e-12)

    run_ranks(world_size, body, model_parallel_size)


def test_candidates_are_neighbours_and_the_nearest_neighbours_of_the_best_three():
    features, labels = examples(C)
    head = a_head(World(), num_neighbors=14)
    head.refresh(0, due=True)
    unit = F.normalize(features)
    logits = unit @ F.normalize(head.weight).T
    near = head.graph.lookup(torch.arange(C))[1].view(C, 14)  # the nearest first
    pairs, found, _, classes, which = head._pairs(unit, labels, torch.zeros_like(labels))
    for i, label in enumerate(labels):
        best = near[label][logits[i, near[label]].topk(3).indices]
        expected = torch.cat([label[None], near[label], near[best, :12].flatten()]).unique()
        assert torch.equal(classes[which[pairs == i]], expected)
        torch.testing.assert_close(found[pairs == i], SCALE * logits[i, expected])


def test_random_rows_stand_for_the_others():
    """The mean over draws of 64 rows of 300 is the sum over all rows that an example has no pair with."""
    unit, labels = F.normalize(examples(300)[0]), examples(300)[1]
    head = a_head(World(), 100, 300)
    head.refresh(0, due=True)
    pairs, _, _, classes, which = head._pairs(unit, labels, similar_parts(unit, 4))
    full = (SCALE * unit @ F.normalize(head.weight).T).exp()
    full[pairs, classes[which]] = 0
    found = torch.stack([head._far(unit, pairs, classes, which, at) for at in range(400)]).exp()
    assert ((found.mean(0) - full.sum(1)).abs() < 5 * found.std(0) / 20).all()


def test_probabilities_of_drawn_classes_follow_their_scores():
    """Half by scores, half evenly; a class of a part comes as often as its π says. One part has fewer candidates."""
    head, draws, targets = a_head(World()), 2000, torch.tensor([3, 30])
    candidates = torch.stack([torch.arange(4, 24), torch.arange(31, 51)])
    candidates[1, 15:] = 2**62
    scores = torch.arange(1.0, 41, dtype=torch.float64).view(2, 20) * (candidates < C)
    expected = 12 / 2 * scores / scores.sum(1, keepdim=True) + 12 / (C - 2) / 2
    times = torch.zeros(2, C, dtype=torch.float64)
    for at in range(draws):
        chosen = head._drawn_by_score(targets, candidates, candidates < 0, scores, torch.tensor([12, 12]),
                                      head._generator(at))
        for i, (drawn, offset) in enumerate(chosen):
            assert len(drawn) == len(drawn.unique()) == 12 and not torch.isin(targets, drawn).any()
            times[i, drawn] += 1
            place = torch.searchsorted(candidates[i], drawn).clamp(max=19)
            known = candidates[i][place] == drawn
            torch.testing.assert_close(offset[known], -expected[i, place[known]].log())
    for i, ids in enumerate(candidates):
        share, found = expected[i, ids < C], times[i, ids[ids < C]] / draws
        assert ((found - share).abs() < 5 * (share * (1 - share) / draws).sqrt()).all()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("copies", [1, 2])
def test_row_gradients_of_micro_batches_are_summed(copies, parts):
    """Three micro-batches on each copy of the classifier, of which each takes other classes, against dense softmax."""
    features = torch.randn(copies, 3, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(12 * copies).view(copies, 3, 4)

    def body(world):
        head = a_head(world, 25, near_parts=parts)
        head.refresh(0, due=True)
        head.select(labels[world.rank].flatten(), 1, micro_batches=3)
        offsets = []
        for i in range(3):
            head.use_selection(i)
            head(features[world.rank, i].clone().requires_grad_(), labels[world.rank, i], labels.numel())
            selection = head.selections[i]
            table = selection.offsets(slice(0, len(head.weight)), torch.float64)
            offsets.append(table[selection.parts_of_examples(4)])
        head.reduce()
        return torch.stack(offsets), torch.zeros_like(head.weight).index_copy_(0, head.selection.active, head.row_grad)

    ranks = run_ranks(copies, body, 1)
    rows = initial_rows(Shard(0, C), D, SEED, torch.float64).requires_grad_()
    loss = 0
    for rank in range(copies):
        logits = SCALE * F.normalize(features[rank], dim=2) @ F.normalize(rows).T + ranks[rank][0]
        loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[rank].flatten(), reduction="sum") / labels.numel()
    loss.backward()
    torch.testing.assert_close(ranks[0][1], rows.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_before_the_first_build_the_choice_is_that_of_sampled_softmax(world_size, model_parallel_size):
    def body(world):
        features, labels = examples(C)
        mine = Shard.of(G, world.size, world.rank)
        features, labels = features[mine.first : mine.last], labels[mine.first : mine.last]
        heads = a_head(world), SampledHead(C, D, world, active_classes=31, seed=SEED, dtype=torch.float64, scale=SCALE)
        found = []
        for head in heads:
            head.select(labels, 3)
            loss = head(features.clone().requires_grad_(), labels, G)
            head.reduce()
            found.append((head.selection.active, head.selection.offset, loss.detach(), head.row_grad))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and not heads[0].has_built

    run_ranks(world_size, body, model_parallel_size)


def test_micro_batches_draw_other_classes():
    features, labels = examples(C)
    head = a_head(World(), near_parts=1)
    head.refresh(0, due=True)
    head.select(labels.repeat(2), 0, micro_batches=2)
    for i in range(2):
        head.use_selection(i)
        head(features, labels, 2 * G)
    one, two = head.selections
    assert not torch.equal(one.active, two.active)


def test_few_examples_of_a_part_have_large_blocks():
    """Logits of 13 numbers at most: one row for 11 examples, two for those of a part, since D is 5."""
    head = a_head(World(), near_parts=8, logits_mb=1e-4)
    step(head)
    num_shared = head.selections[0].num_shared
    sizes = {(block.stop <= num_shared, block.stop - block.start) for block in head.active_row_cache.blocks}
    assert (False, 2) in sizes and {size for shared, size in sizes if shared} == {1}


def test_parts_are_near_equal_similar_and_the_same_in_any_type():
    features = F.normalize(torch.randn(37, 16, generator=torch.Generator().manual_seed(1)))
    part_of = similar_parts(features, 4)
    counts = part_of.bincount(minlength=4)
    assert counts.sum() == 37 and counts.max() - counts.min() <= 1
    assert torch.equal(part_of, similar_parts(features.double(), 4))
    inside = torch.stack([features[part_of == i].mean(0) for i in range(4)]).norm(dim=1).mean()
    assert inside > 1.2 * torch.stack([features[i::4].mean(0) for i in range(4)]).norm(dim=1).mean()
    assert similar_parts(features[:0], 2).tolist() == [] and similar_parts(features[:1], 4).tolist() == [3]


def test_parts_of_a_config():
    def of(**flags):
        return near_parts(Config(data="d", out="o", head="knn", **flags), num_classes)

    num_classes = 5000

    assert of(near_parts=2) == 2
    assert of(active_classes=1.0) == 1
    assert of(active_classes=0.1, global_batch=64) == 8  # no part has fewer examples than 8
    assert of(active_classes=0.1, global_batch=64, micro_batches=2) == 4
    assert of(active_classes=0.4, global_batch=64) == 4  # 968 near classes for 64 examples
    assert of(active_classes=500.0, global_batch=256) == 16  # 8,000 rows
    assert of(active_classes=600.0, global_batch=256) == 8  # as many parts as any budget may have
    with pytest.raises(UserError, match="--near-parts 3"):
        of(near_parts=3)
    with pytest.raises(UserError, match="--near-parts 64 is not allowed: a micro-batch has 32 examples"):
        of(near_parts=64, global_batch=64, micro_batches=2)
