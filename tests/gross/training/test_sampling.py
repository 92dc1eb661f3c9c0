"""The sampler in a user's own loop: what it draws, and what a step leaves untouched."""

import copy
import json
from collections import Counter

import gross
import pytest
import torch
from gross.decomposition import decompose
from gross.supernet import configuration, decomposed_layers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SIZES = (1, 2, 4)


def make_supernet(layers: int = 2) -> nn.Sequential:
    """Convolutions of eight channels, each but the first with three group sizes."""
    convolutions = [nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers))]
    network = nn.Sequential(*convolutions)
    return decompose(network, SIZES, skip=(), method="random", quiet=True)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def drawn(sampler: gross.Sampler, steps: int) -> list[list[tuple[int, ...]]]:
    return [list(sampler.step()) for _ in range(steps)]


def largest_terms(supernet: nn.Module) -> list[nn.Parameter]:
    """The terms of every layer that only the largest group size uses."""
    return [
        series[-1]
        for layer in decomposed_layers(supernet).values()
        for series in (layer.pointwise_in, layer.grouped, layer.pointwise_out)
    ]


# What is drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["uniform", "temperature", "sandwich", "fair"])
@pytest.mark.parametrize("form", ["relative", "literal"])
def test_draws_follow_the_announced_probabilities(policy, form):
    """Catches probabilities that are not those that the draws have, by layer and size."""
    sampler = gross.Sampler(make_supernet(), policy, alpha=1.5, form=form)
    steps = 6000
    configurations = [c for step in drawn(sampler, steps) for c in step]
    for position, shares in enumerate(sampler.probabilities().values()):
        counts = Counter(c[position] for c in configurations)
        assert sum(shares.values()) == pytest.approx(len(sampler))
        for size, share in shares.items():
            assert counts[size] / steps == pytest.approx(share, abs=0.03)


def test_temperature_is_equation_8_in_both_forms():
    """Catches another exponent: α = 4 read literally draws the smallest size 98 times of 100."""
    convolutions = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1))
    sizes = (1, 2, 4, 8, 16, 32, 64)
    structure = {"1": sizes}
    supernet = decompose(convolutions, structure, method="random", quiet=True)
    literal = torch.tensor([-4.0 * i for i in range(1, 8)]).softmax(0).tolist()
    relative = torch.tensor([-4.0 * i / 7 for i in range(1, 8)]).softmax(0).tolist()
    for form, expected in (("literal", literal), ("relative", relative)):
        sampler = gross.Sampler(supernet, "temperature", alpha=4.0, form=form)
        (shares,) = sampler.probabilities().values()
        assert list(shares.values()) == pytest.approx(expected, rel=1e-6)
    assert literal[0] > 0.98
    uniform = gross.Sampler(supernet, "temperature", alpha=0.0).probabilities()
    assert list(uniform["1"].values()) == pytest.approx([1 / 7] * 7)
    # Exponents of any size: the largest is taken off first.
    (cold,) = gross.Sampler(supernet, "temperature", alpha=-1e4).probabilities().values()
    assert cold[64] == 1.0


def test_layers_are_drawn_independently():
    """Catches one draw for all layers: 252 configurations would be 6."""
    seen = {c for step in drawn(gross.Sampler(make_supernet()), 200) for c in step}
    assert len(seen) == len(SIZES) ** 2


def test_sandwich_runs_the_extremes_and_two_others():
    """Catches a rule that misses the largest or the smallest configuration."""
    for step in drawn(gross.Sampler(make_supernet(), "sandwich"), 20):
        assert step[:2] == [(4, 4), (1, 1)]
        assert len(step) == 4


def test_fair_draws_every_size_once_a_round():
    """Catches draws with replacement, and rounds that are all in one order."""
    steps = drawn(gross.Sampler(make_supernet(), "fair"), 60)
    orders = set()
    for position in (0, 1):
        sizes = [step[0][position] for step in steps]
        rounds = [tuple(sizes[i : i + 3]) for i in range(0, 60, 3)]
        assert all(sorted(order) == list(SIZES) for order in rounds)
        orders |= set(rounds)
    assert len(orders) == 6
    assert {step[0] for step in steps} == {(a, b) for a in SIZES for b in SIZES}


@pytest.mark.parametrize("policy", ["uniform", "sandwich", "fair"])
def test_seeds_and_states_repeat_the_path(policy):
    """Catches a path that depends on torch's generator, and a state that forgets where it was."""
    supernet = make_supernet()
    path = drawn(gross.Sampler(supernet, policy, seed=3), 12)
    torch.manual_seed(99)
    again = gross.Sampler(make_supernet(), policy, seed=3)
    assert drawn(again, 5) == path[:5]
    state = json.loads(json.dumps(again.state_dict()))
    resumed = gross.Sampler(supernet, policy, seed=3)
    resumed.load_state_dict(state)
    assert drawn(resumed, 7) == path[5:]
    assert drawn(gross.Sampler(supernet, policy, seed=4), 12) != path
    with pytest.raises(ValueError, match="seed: got a state of 3, accepted is 4"):
        gross.Sampler(supernet, policy, seed=4).load_state_dict(state)


def test_step_sets_its_configuration_even_if_nobody_iterates():
    """Catches a lazy step, which would leave a loop without ``for`` at the largest size."""
    supernet = make_supernet()
    paths = []
    for iterate in (False, True):
        sampler = gross.Sampler(supernet, seed=1)
        paths.append([])
        for _ in range(10):
            step = sampler.step()
            paths[-1].append(next(step) if iterate else configuration(supernet))
    assert paths[0] == paths[1]
    assert len(set(paths[0])) > 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((make_supernet(), "random"), {}, "policy: got 'random', accepted is one of 'uniform'"),
        ((make_supernet(),), {"form": "i/N"}, "form: got 'i/N'"),
        ((make_supernet(),), {"alpha": float("nan")}, "alpha: got nan"),
        ((nn.Conv2d(3, 8, 3),), {}, "supernet: got Conv2d without decomposed layers"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    """Catches a sampler that fails later, or draws something."""
    with pytest.raises(ValueError, match=message):
        gross.Sampler(*arguments, **options)


# What a step leaves untouched -------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_neither_momentum_nor_decay_moves_an_inactive_term(optimizer):
    """Catches zero gradients: with them the momentum of earlier steps and weight decay move terms
    that no forward of the step used."""
    supernet = make_supernet()
    sampler = gross.Sampler(supernet, seed=2)
    update = (
        torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if optimizer == "sgd"
        else torch.optim.AdamW(supernet.parameters(), lr=0.1)
    )
    moved = {True: 0, False: 0}
    for _ in range(20):
        sampler.step()
        supernet(images()).square().mean().backward()
        sampler.release()
        before = copy.deepcopy(list(supernet.parameters()))
        update.step()
        update.zero_grad()
        changed = {
            id(p): not torch.equal(p, q) for p, q in zip(supernet.parameters(), before, strict=True)
        }
        for layer in decomposed_layers(supernet).values():
            for series in (layer.pointwise_in, layer.grouped, layer.pointwise_out):
                for size, term in zip(SIZES, series, strict=True):
                    active = size <= layer.group_size
                    assert changed[id(term)] == active
                    moved[active] += 1
    assert min(moved.values()) > 20


def test_release_keeps_what_any_forward_of_the_step_used():
    """Catches a release that looks at the last configuration alone: the sandwich rule runs the
    largest first, and gradient accumulation several steps."""
    supernet = make_supernet()
    sandwich = gross.Sampler(supernet, "sandwich")
    for _ in sandwich.step():
        supernet(images()).square().mean().backward()
    configuration_before = configuration(supernet)
    sandwich.release()
    assert all(term.grad is not None for term in largest_terms(supernet))
    assert configuration(supernet) == configuration_before

    supernet.zero_grad()
    sampler = gross.Sampler(supernet)
    used = [set(), set()]
    for _ in range(2):
        (sizes,) = sampler.step()
        supernet(images()).square().mean().backward()
        for seen, size in zip(used, sizes, strict=True):
            seen.add(size)
    sampler.release()
    for layer, seen in zip(decomposed_layers(supernet).values(), used, strict=True):
        for size, term in zip(SIZES, layer.grouped, strict=True):
            assert (term.grad is not None) == (size <= max(seen))
    # The next step begins anew.
    supernet.zero_grad()
    while (4, 4) in sampler.step():
        pass
    sampler.release()


def test_layers_that_share_their_terms_release_what_neither_used():
    """Catches gradients lost where the other layer ran at a larger size."""
    convolution = nn.Conv2d(8, 8, 3, padding=1)
    twin = nn.Conv2d(8, 8, 3, padding=1)
    twin.weight = convolution.weight
    network = nn.Sequential(nn.Conv2d(3, 8, 1), convolution, nn.ReLU(), twin)
    supernet = decompose(network, SIZES, skip=(), method="random", quiet=True)
    first, second = decomposed_layers(supernet).values()
    sampler = gross.Sampler(supernet)
    seen = set()
    for _ in range(30):
        ((a, b),) = sampler.step()
        supernet(images()).square().mean().backward()
        sampler.release()
        for size, term in zip(SIZES, first.grouped, strict=True):
            assert (term.grad is not None) == (size <= max(a, b))
        seen.add((a > b) - (a < b))
        supernet.zero_grad()
    assert first.grouped is second.grouped
    assert seen == {-1, 0, 1}


# Together with what users have ------------------------------------------------------------------


def test_summed_losses_give_the_gradients_of_separate_backward_passes():
    """Catches a configuration taken from the layer in the backward pass: trainers that own it get
    the sum of a step's losses, and every forward then runs before the first backward."""
    supernet = make_supernet()
    batch = images()
    gradients = []
    for summed in (False, True):
        sampler = gross.Sampler(supernet, "sandwich")
        supernet.zero_grad()
        if summed:
            sum(supernet(batch).square().mean() for _ in sampler.step()).backward()
        else:
            for _ in sampler.step():
                supernet(batch).square().mean().backward()
        gradients.append([p.grad.clone() for p in supernet.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_ema_copies_follow_and_run():
    """Catches a copy that shares its terms or its configuration with the original."""
    supernet = make_supernet()
    average = AveragedModel(supernet, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    sampler = gross.Sampler(supernet)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    expected = copy.deepcopy(list(supernet.parameters()))
    for step in range(4):
        sampler.step()
        supernet(images()).square().mean().backward()
        sampler.release()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(supernet)
        expected = [
            p.detach().clone() if step == 0 else (e + p.detach()) / 2
            for e, p in zip(expected, supernet.parameters(), strict=True)
        ]
    for actual, value in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(actual, value)
    gross.set_configuration(average.module, (1, 4))
    batch, small = images(), copy.deepcopy(average.module)
    assert torch.equal(average(batch), small(batch))
    gross.set_configuration(supernet, (4, 4))
    assert configuration(average.module) == (1, 4)


def test_clipping_counts_active_terms_alone():
    """Catches a norm that gradients of zeros or None break."""
    supernet = make_supernet()
    sampler = gross.Sampler(supernet)
    for _ in range(5):
        sampler.step()
        (100 * supernet(images()).square().sum()).backward()
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in supernet.parameters() if p.grad is not None])
        )
        sampler.release()
        torch.testing.assert_close(nn.utils.clip_grad_norm_(supernet.parameters(), 1.0), norm)
        clipped = [p.grad.norm() for p in supernet.parameters() if p.grad is not None]
        torch.testing.assert_close(torch.stack(clipped).norm(), torch.tensor(1.0))
        supernet.zero_grad()


def test_scaled_gradients_of_mixed_precision_train():
    """Catches a scaler that finds no gradients, or skips every step, with terms released."""
    supernet = make_supernet()
    sampler = gross.Sampler(supernet)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = images()
    losses = []
    for _ in range(30):
        sampler.step()
        with torch.autocast("cpu", torch.bfloat16):
            output = supernet(batch)
        loss = (output.float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        sampler.release()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)]
)
def test_one_compiled_graph_serves_every_configuration(backend):
    """Catches a recompilation for each configuration: 252 of them would compile for an hour."""
    torch._dynamo.reset()
    supernet = make_supernet()
    compiled = torch.compile(supernet, backend=backend, fullgraph=True)
    sampler = gross.Sampler(supernet)
    batch = images()
    compiled(batch).square().mean().backward()
    supernet.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(12):
            sampler.step()
            output = compiled(batch)
            output.square().mean().backward()
            gradients = [p.grad.clone() for p in supernet.parameters()]
            supernet.zero_grad()
            expected = supernet(batch)
            expected.square().mean().backward()
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            for gradient, p in zip(gradients, supernet.parameters(), strict=True):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
            sampler.release()
            supernet.zero_grad()
