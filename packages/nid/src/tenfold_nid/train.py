"""Training: the dictionary (section 2.4), and whatever its baselines learn before they see a new signal (section 8)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_shared.batches import generator
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything

from .baselines.linear import LinearDictionary, ksvd, pca
from .baselines.networks import AutoDecoder, NetworkBatch, maml_step, reptile_step, signal_losses
from .checkpoints import load_dictionary
from .coordinates import lattice
from .dictionary import Mixture, NeuralDictionary
from .errors import refuse_precision
from .evaluate import observe, shown_to
from .losses import l1_weights
from .networks import NetworkConfig
from .optimisation import Sampled, adam, gate_parameters, is_dense, training_step
from .plan import Plan
from .recipe import LINEAR, UNTRAINED, Recipe
from .shapes import point_cloud_loss
from .signals import Signals, load_points, load_signals


def train(recipe: Recipe, options: RunOptions) -> None:
    """Learn what a recipe describes and keep it."""
    with Run("nid", recipe, options) as run:
        model, signals = run_recipe(run, recipe)
        if run.is_main:
            count = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
            print(
                f"{recipe.method} on {recipe.data.name}: {len(signals.train)} signals, {count} numbers; {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Signals]:
    """Learn what the recipe describes; returns it with the signals.

    Raises:
        UserError: the recipe does not fit the data, or there is nothing to learn.
        RunFailure: the loss is no longer finite.

    """
    if recipe.method in UNTRAINED:
        raise UserError(f"{recipe.method} learns nothing: reproduce compares with it, and so does the verb of its task")
    if recipe.method != "nid":
        if run.world > 1:
            raise UserError(f"{recipe.method} trains in one process: start it without torchrun")
        refuse_precision(run.options, recipe.method, networks=recipe.method not in LINEAR)
    if recipe.data.name == "pointcloud":
        return learn_surface(run, recipe), Signals(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    signals = load_signals(recipe.data).to(run.device)
    seed_everything(run.options.seed, "init")
    try:
        model = LEARNERS[recipe.method](run, recipe, signals)
    except ValueError as error:  # of the method: a shape that cannot be built, more atoms than signals
        raise UserError(str(error)) from error
    run.save_weights("last", model, **about(recipe, model))
    return model, signals


def about(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to build its model again, and to evaluate it as it was meant to be."""
    root = None if recipe.data.root is None else str(recipe.data.root)
    kept: dict[str, Any] = {"method": recipe.method, "data": {**dataclasses.asdict(recipe.data), "root": root}}
    kept |= {"fit": dataclasses.asdict(recipe.fit)}
    if isinstance(model, NeuralDictionary):
        kept |= {"dictionary": dataclasses.asdict(model.config)}
        kept |= {"load_mode": model.load_mode, "importance_mode": model.importance_mode}
    elif isinstance(model, NetworkBatch):
        kept |= {"network": dataclasses.asdict(model.config), "count": model.weights[0].shape[0]}
        kept |= {"test_optimiser": recipe.meta.test_optimiser} if recipe.method in {"maml", "reptile"} else {}
    elif isinstance(model, AutoDecoder):
        kept |= {"network": dataclasses.asdict(model.config), "latents": list(model.latents.weight.shape)}
    elif recipe.method == "ksvd":
        kept |= {"sparsity": recipe.linear.sparsity}
    return kept


# -- the dictionary -------------------------------------------------------------------------------------------------------


def create_dictionary(recipe: Recipe, signals: Tensor) -> NeuralDictionary:
    """The recipe's dictionary for signals of this size; a codebook gets a row a signal."""
    spatial = tuple(signals.shape[1:-1])
    channels = signals.shape[-1]
    config = dataclasses.replace(
        recipe.model, in_dim=len(spatial), out_dim=channels, size=spatial, num_signals=len(signals)
    )
    return NeuralDictionary(config, load_mode=recipe.load_mode, importance_mode=recipe.importance_mode)


def learn_dictionary(run: Run, recipe: Recipe, signals: Signals) -> NeuralDictionary:
    """Adam on atoms and gate together, or, to fine-tune, on the gate alone (sections 2.3 to 2.5)."""
    learned = signals.seen if recipe.finetune else signals.train
    model = pretrained(recipe, learned) if recipe.pretrained else create_dictionary(recipe, learned)
    if recipe.finetune:
        model.experts.requires_grad_(False)
    schedule, settings = recipe.schedule, recipe.objective
    plan_seed = derived_seed(run.options.seed, "order")
    plan = Plan(recipe, learned, model.to(run.device), seed=plan_seed, rank=run.rank, world=run.world)
    weights = l1_weights(model.config.num_experts, settings.l1_exp, cap=settings.l1_cap, device=run.device)
    sampled: Any = Sampled(model, plan.places)
    optimiser: Any = adam(
        gate_parameters(model) if recipe.finetune else list(model.parameters()), schedule.lr, schedule.weight_decay
    )
    sampled, optimiser = run.prepare(sampled, optimiser)
    for step in run.steps("train", plan.steps, model=sampled, optimiser=optimiser):
        for group in optimiser.param_groups:
            group["lr"] = rate(recipe, step, plan.steps)
        batch = plan[step]
        if run.world > 1:
            look_up(model, batch.ids.to(run.device))
        losses = training_step(
            sampled,
            optimiser,
            batch.signal,
            batch.where,
            batch.targets,
            settings,
            dense=is_dense(batch.epoch, schedule.warmup_epochs, official=schedule.official_warmup),
            weights=weights,
            share=batch.share,
            balance=over_processes if run.world > 1 else None,
            backward=run.backward,
        )
        total, data = run.reduce(torch.stack([losses.total, losses.data]), "mean")
        run.log(loss=total, data=data, balance=losses.balance)
    run.complete("train", model, **about(recipe, model))
    return model.eval()


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Step size: constant, or half a cosine down to zero."""
    peak = recipe.schedule.lr
    return peak if recipe.schedule.schedule == "constant" else peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def look_up(model: NeuralDictionary, ids: Tensor) -> None:
    """Rescale the rows that all processes' signals have in the codebooks, so that the processes stay alike."""
    with torch.no_grad():
        for codebook in model.codebooks():
            codebook(ids)


def over_processes(mixture: Mixture) -> Mixture:
    """Importance and load of the batch that all processes share; their variation is no mean over signals."""
    from torch.distributed.nn.functional import all_reduce  # noqa: PLC0415

    if mixture.load is None:
        return mixture._replace(importance=all_reduce(mixture.importance))
    both = all_reduce(torch.stack([mixture.importance, mixture.load.to(mixture.importance.dtype)]))
    return mixture._replace(importance=both[0], load=both[1])


def pretrained(recipe: Recipe, signals: Tensor) -> NeuralDictionary:
    """The dictionary of a checkpoint, its codebook, if it has one, made anew with a row a signal."""
    assert recipe.pretrained is not None
    model, _ = load_dictionary(recipe.pretrained)
    model.load_mode, model.importance_mode = recipe.load_mode, recipe.importance_mode
    size = tuple(signals.shape[1:-1])
    if signals.shape[-1] != model.config.out_dim or len(size) != model.config.in_dim:
        raise UserError(
            f"--pretrained {recipe.pretrained}: the dictionary represents {model.config.in_dim}-D signals of "
            f"{model.config.out_dim} channels, {recipe.data.name} has {len(size)}-D ones of {signals.shape[-1]}"
        )
    if model.config.gate == "codebook":
        model.config = dataclasses.replace(model.config, num_signals=len(signals), size=size)
        model.renew_codebooks(len(signals))
    return model.train()


# -- the baselines --------------------------------------------------------------------------------------------------------


def network_config(recipe: Recipe, signals: Tensor) -> NetworkConfig:
    """The recipe's network for signals of this size."""
    return dataclasses.replace(recipe.network, in_dim=signals.ndim - 2, out_dim=signals.shape[-1])


def learn_networks(run: Run, recipe: Recipe, signals: Signals) -> nn.Module:
    """A network for each new signal, from scratch, on the samples or the projections that are observed."""
    observed, schedule = observe(signals, recipe.data, run.options.seed), recipe.schedule
    networks = NetworkBatch(network_config(recipe, signals.seen), len(signals.seen)).to(run.device)
    fitted, where, targets = shown_to(networks, observed)
    optimiser: Any = torch.optim.Adam(networks.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    for step in run.steps("train", schedule.epochs, model=networks, optimiser=optimiser):
        for group in optimiser.param_groups:
            group["lr"] = rate(recipe, step, schedule.epochs)
        places, there = where, targets
        if targets.shape[1] > schedule.chunk_size:
            points = torch.randperm(targets.shape[1], device=run.device)[: schedule.chunk_size]
            places, there = where[points] if observed.mask is None else where[:, points], targets[:, points]
        with run.accelerator.autocast():
            loss = signal_losses(fitted(places), there, None)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        run.log(loss=loss / len(targets))
    run.complete("train", networks, **about(recipe, networks))
    return networks


def learn_surface(run: Run, recipe: Recipe) -> nn.Module:
    """One network whose level 0 passes through oriented points (section 6)."""
    if recipe.method != "scratch":
        raise UserError("a point cloud is one shape, fitted by one network: use --method scratch")
    seed_everything(run.options.seed, "init")
    surface, normals = (x.to(run.device) for x in load_points(recipe.data))
    config = dataclasses.replace(recipe.network, in_dim=3, out_dim=1)
    network = NetworkBatch(config, 1).to(run.device)
    schedule = recipe.schedule
    optimiser: Any = torch.optim.Adam(network.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    count = schedule.batch_size
    for step in run.steps("train", schedule.epochs, model=network, optimiser=optimiser):
        for group in optimiser.param_groups:
            group["lr"] = rate(recipe, step, schedule.epochs)
        chosen = torch.randint(len(surface), (count,), device=run.device)
        off = torch.rand(count, 3, device=run.device) * 2 - 1
        with run.accelerator.autocast():
            loss = point_cloud_loss(lambda x: network(x)[0], surface[chosen], normals[chosen], off)
        optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        optimiser.step()
        run.log(loss=loss.total)
    run.complete("train", network, **about(recipe, network))
    run.save_weights("last", network, **about(recipe, network))
    return network


def learn_start(run: Run, recipe: Recipe, signals: Signals) -> nn.Module:
    """A start for all networks, by MAML or Reptile."""
    meta, schedule = recipe.meta, recipe.schedule
    coords, targets = lattice(signals.train.shape[1:-1], device=run.device), signals.train.flatten(1, -2)
    start = NetworkBatch(network_config(recipe, signals.train), 1).to(run.device)
    optimiser: Any = torch.optim.Adam(start.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    per_epoch = -(-len(targets) // schedule.batch_size)
    for step in run.steps("train", schedule.epochs * per_epoch, model=start, optimiser=optimiser):
        chosen = batch_of(run, step, per_epoch, len(targets), schedule.batch_size)
        points = torch.randperm(len(coords), device=run.device)[: schedule.chunk_size]
        places, batch = coords[points], targets[chosen[:, None], points]
        if recipe.method == "maml":
            for group in optimiser.param_groups:
                group["lr"] = rate(recipe, step, schedule.epochs * per_epoch)
            with run.accelerator.autocast():
                loss = maml_step(
                    start,
                    optimiser,
                    places,
                    batch,
                    inner_steps=meta.inner_steps,
                    inner_lr=meta.inner_lr,
                    second_order=meta.second_order,
                )
            run.log(loss=loss)
        else:
            with run.accelerator.autocast():
                moved = reptile_step(
                    start, places, batch, inner_steps=meta.inner_steps, inner_lr=meta.inner_lr, rate=meta.rate
                )
            run.log(moved=moved)
    run.complete("train", start, **about(recipe, start))
    return start


def learn_decoder(run: Run, recipe: Recipe, signals: Signals) -> nn.Module:
    """The auto-decoder with a latent vector for every training signal."""
    schedule = recipe.schedule
    coords, targets = lattice(signals.train.shape[1:-1], device=run.device), signals.train.flatten(1, -2)
    decoder = AutoDecoder(network_config(recipe, signals.train), recipe.latent_dim, len(targets)).to(run.device)
    groups = [{"params": decoder.network.parameters()}, {"params": decoder.latents.parameters()}]
    optimiser: Any = torch.optim.Adam(groups, lr=schedule.lr, weight_decay=schedule.weight_decay)
    per_epoch = -(-len(targets) // schedule.batch_size)
    for step in run.steps("train", schedule.epochs * per_epoch, model=decoder, optimiser=optimiser):
        pace = rate(recipe, step, schedule.epochs * per_epoch)
        optimiser.param_groups[0]["lr"] = pace
        optimiser.param_groups[1]["lr"] = pace * recipe.latent_lr / schedule.lr
        chosen = batch_of(run, step, per_epoch, len(targets), schedule.batch_size)
        points = torch.randint(len(coords), (min(schedule.chunk_size, len(coords)),), device=run.device)
        with run.accelerator.autocast():
            preds = decoder(chosen, coords[points])
        loss = (preds - targets[chosen[:, None], points]).square().mean()
        loss = loss + 1e-4 * decoder.latents(chosen).square().sum(dim=1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        run.log(loss=loss)
    run.complete("train", decoder, **about(recipe, decoder))
    return decoder


def learn_linear(run: Run, recipe: Recipe, signals: Signals) -> nn.Module:
    """PCA or K-SVD of the training signals."""
    settings, rows = recipe.linear, signals.train.flatten(1)
    if recipe.method == "pca":
        model: LinearDictionary = pca(rows, settings.components, whiten=True)
    else:
        chosen = rows[torch.linspace(0, len(rows) - 1, min(settings.signals, len(rows))).long()]
        seed = run.options.seed
        model = ksvd(chosen, settings.components, settings.sparsity, iterations=settings.iterations, seed=seed)
    run.complete("train", model, **about(recipe, model))
    return model


def batch_of(run: Run, step: int, per_epoch: int, count: int, size: int) -> Tensor:
    """Signals of a step, every one once an epoch."""
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=generator(derived_seed(run.options.seed, "order"), epoch))
    return order[position * size : (position + 1) * size].to(run.device)


LEARNERS: dict[str, Callable[[Run, Recipe, Signals], nn.Module]] = {
    "nid": learn_dictionary,
    "scratch": learn_networks,
    "maml": learn_start,
    "reptile": learn_start,
    "latent": learn_decoder,
    "pca": learn_linear,
    "ksvd": learn_linear,
}
