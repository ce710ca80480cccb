"""How fast training is beside a bare ResNet, beside its own step, and beside the way that re-ID code trains.

    python benchmarks/training_speed.py                       on the CPU, some minutes; on a GPU begin with gpu.py
    python benchmarks/training_speed.py --save benchmarks/results/training_speed.cpu.json

Parts, each measured side by side in this one run (`--parts` chooses):

    data        batches from the store to network input, against a chain of PIL and torchvision for each image in
                worker processes
    step        an optimiser step with all losses, against one of timm's bare ResNet of the same depth, size, last
                stride, precision and memory format
    loop        a whole epoch of the training loop, against its steps alone on one batch that is there already
    peers       the same network in float32, contiguous, with the fused map built in full, images augmented one by one
                in worker processes, the loss read back after every step, and the allocator as it comes
    saving      what `--grad-checkpointing`, and `--cached-triplet` over two batches, cost in time
    batches     rate and memory of other batch sizes
    profile     where the time of a step goes, by kind of operation (torch's profiler)

`--settings` go to every run of this library's, as flags of `vireid train` would: `amp=False grad_checkpointing=True`.
Prints a table and, as its last line, one JSON object. Ratios are medians over repeats that alternate.
"""

import argparse
import gc
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measuring import alternate, finish, publish, ratio
from PIL import Image
from timm.utils import ParseKwargs
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from vireid_timm.data.loader import Batch
from vireid_timm.data.workers import default_workers
from vireid_timm.device import keep_memory, peak_memory, resolve_device, seeded_torch
from vireid_timm.models.dual_stream import set_last_stride
from vireid_timm.training.checkpoint import CheckpointInterval
from vireid_timm.training.config import TrainConfig
from vireid_timm.training.graph import WARM_UP, StepGraph
from vireid_timm.training.interrupt import StopRequest
from vireid_timm.training.loop import (
    batch_groups,
    create_progress,
    epoch_batches,
    learning_rates,
    save_if_due,
    start_epoch,
)
from vireid_timm.training.run import Run, create_run
from vireid_timm.training.step import train_step

PARTS = ('data', 'step', 'loop', 'peers', 'profile', 'saving', 'batches')
DATA_BATCHES = 16  # of an epoch without steps: enough to forget how it began

# What torch's profiler calls the operations of a step; the first that fits counts.
OPERATIONS = {
    'convolutions': ('conv',),
    'batch norms': ('norm',),
    'ReLU': ('relu', 'threshold', 'clamp_min_'),
    'sums of maps': ('aten::add',),
    'power means': ('PowerSum', 'aten::pow', 'aten::bmm', 'aten::clamp_'),
    'maximum pooling': ('max_pool',),
    'optimiser': ('sgd', 'Optimizer'),
    'copies and conversions': ('copy', 'contiguous', 'aten::cat', 'aten::fill_', 'aten::zero'),
}


@contextmanager
def training(args: argparse.Namespace, images: int, **settings: Any) -> Iterator[Run]:
    """A run on rendered people, as `vireid train` sets it up with its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            'dataset': 'synthetic',
            'dataset_kwargs': {
                'identities': args.identities,
                'test_identities': 2,
                'images_per_modality': images,
                'size': args.size,
            },
            'model': args.model,
            'input_size': [3, *args.size],
            'identities_per_batch': args.identities,
            'images_per_modality': args.batch_size // (2 * args.identities),
            'val_share': 0.0,
            'cache': 'auto' if args.device.type == 'cuda' else 'ram',
            'output': folder,
            'torchcompile': args.torchcompile,
            **args.settings,
            **settings,
        }
        config = TrainConfig.from_mapping(values)
        with seeded_torch(config.seed, config.deterministic, args.device):
            yield create_run(config, Path(folder), args.device)
        gc.collect()


def drawn(run: Run, count: int) -> list[Batch]:
    """The first batches of the first epoch."""
    with closing(epoch_batches(run)) as all_of_them:
        return list(islice(all_of_them, count))


def image_chain(run: Run) -> Callable[[Image.Image], torch.Tensor]:
    """What re-ID code does to one image: border, crop, flip, channels, normalisation, erasing."""
    augment = run.augments['visible']
    return transforms.Compose(
        [
            transforms.Pad(10),
            transforms.RandomCrop(run.input_size[1:]),
            transforms.RandomHorizontalFlip(),
            transforms.RandomGrayscale(1 / 7),
            transforms.ToTensor(),
            transforms.Normalize(augment.mean, augment.std),
            transforms.RandomErasing(0.5, (0.02, 0.4), (0.3, 3.33), 'random'),
        ]
    )


class PerImage(Dataset):
    """Stored images that a worker augments one by one."""

    def __init__(self, run: Run) -> None:
        self.images = run.data.store[:].permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.chain = run.data.labels, image_chain(run)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.chain(Image.fromarray(self.images[row])), int(self.labels[row])


def per_image(run: Run, count: int, workers: int) -> DataLoader:
    """The first batches of the first epoch the way re-ID code makes them; the workers stay."""
    run.data.sampler.set_epoch(0)
    order = list(islice(run.data.sampler, count))
    return DataLoader(PerImage(run), batch_sampler=order, num_workers=workers, persistent_workers=workers > 0)


def data(args: argparse.Namespace) -> dict[str, float]:
    """Images per second from the store to network input."""
    images = DATA_BATCHES * args.batch_size // (2 * args.identities)
    with training(args, images=images, cache='disk') as run:
        count = run.batches_per_epoch
        total = sum(len(batch.labels) for batch in drawn(run, count))
        loader = per_image(run, count, args.workers)
        works = {
            'ours': lambda: [None for _ in drawn_one_by_one(run)],
            'chain': lambda: [None for _ in loader],
        }
        times = alternate(works, args.device, 2 * args.repeats + 1)
    rate, chain_rate = (total / statistics.median(times[name]) for name in ('ours', 'chain'))
    return {
        'data_images_per_s': rate,
        'data_ms_per_batch': 1000 * args.batch_size / rate,
        'chain_images_per_s': chain_rate,
        'data_over_chain': ratio(times, 'chain', 'ours'),
    }


def drawn_one_by_one(run: Run) -> Iterator[Batch]:
    """A whole epoch's batches, none of which is kept."""
    with closing(epoch_batches(run)) as all_of_them:
        yield from all_of_them


def unsettled(run: Run) -> int:
    """Steps that are slower than all later ones: the first, or those before and with the recording of a CUDA graph."""
    return WARM_UP + 1 if run.graph else 1


def bare_step(run: Run, num_classes: int) -> Callable[[Batch], None]:
    """An optimiser step of timm's ResNet alone, treated as the run's own: one stem, one classifier, one loss."""
    depth = run.config.model.partition('.')[0].rpartition('_r')[2]
    network = timm.create_model(f'resnet{depth}', num_classes=num_classes)
    set_last_stride(network.layer4, 1)
    network = network.to(run.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    forward = torch.compile(network) if run.config.torchcompile else network
    graph = StepGraph(optimizer, run.device) if run.graph else None

    def learn(visible: torch.Tensor, infrared: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        images = torch.cat((visible, infrared))
        with torch.autocast(run.device.type, dtype=run.amp_dtype or torch.bfloat16, enabled=run.amp_dtype is not None):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {'loss': loss.detach()}

    def step(batch: Batch) -> None:
        inputs = (*batch.inputs, batch.labels)
        learn(*inputs) if graph is None else graph(learn, *inputs)

    return step


def step(args: argparse.Namespace) -> dict[str, Any]:
    """The network with all losses against a bare ResNet, on the same batch."""
    with training(args, images=args.batch_size // (2 * args.identities)) as run:
        (batch,) = drawn(run, 1)
        bare = bare_step(run, len(run.data.class_map))
        works = {'bare': lambda: bare(batch), 'ours': lambda: train_step(run, [batch])}
        run.task.train()
        times = alternate(works, args.device, args.repeats, unsettled(run))
        precision = str(run.amp_dtype or torch.float32).removeprefix('torch.')
    return {
        'precision': precision,
        'bare_step_s': statistics.median(times['bare']),
        'step_s': statistics.median(times['ours']),
        'step_over_bare': ratio(times, 'ours', 'bare'),
    }


def loop(args: argparse.Namespace) -> dict[str, float]:
    """Epochs of the training loop, from stored images on, against as many steps on one batch."""
    with training(args, images=args.images) as run:
        count = run.batches_per_epoch
        (batch,) = drawn(run, 1)
        run.task.train()
        works = {'steps': lambda: [train_step(run, [batch]) for _ in range(count)], 'epoch': lambda: epoch(run)}
        times = alternate(works, args.device, args.repeats)
    return {
        'loop_steps': count,
        'loop_s': statistics.median(times['epoch']),
        'loop_over_step_rate': ratio(times, 'steps', 'epoch'),
    }


def epoch(run: Run, steps: int | None = None) -> None:
    """One epoch of the training loop, always the first, or its first steps."""
    interval, stop = CheckpointInterval(''), StopRequest()
    with closing(create_progress(run)) as progress:
        start_epoch(run, progress)
        for group in islice(batch_groups(run), steps):
            for batch, result in zip(group, train_step(run, group), strict=True):
                progress.add(result, batch.labels)
            run.state.step = progress.step
            progress.log_if_due(learning_rates(run))
            save_if_due(run, progress, interval, stop)
        progress.end_epoch(learning_rates(run))
    run.state.step = 0


def peers(args: argparse.Namespace) -> dict[str, float]:
    """Whole loops from stored images on: this library's defaults, and the way of the field's code."""
    count = max(2, args.steps)
    with training(args, images=args.images) as run, field_way(args, count) as theirs:
        run.task.train()

        def ours() -> None:
            with closing(drawn_one_by_one(run)) as all_of_them:
                for batch in islice(all_of_them, count):
                    train_step(run, [batch])

        times = alternate({'peers': theirs, 'ours': ours}, args.device, args.repeats)
    images = count * args.batch_size
    return {
        'peers_images_per_s': images / statistics.median(times['peers']),
        'images_per_s': images / statistics.median(times['ours']),
        'over_peers': ratio(times, 'peers', 'ours'),
    }


@contextmanager
def field_way(args: argparse.Namespace, count: int) -> Iterator[Callable[[], None]]:
    """A call for so many steps of the field's way, in a process of its own: there nobody has tuned the allocator."""
    context = get_context('spawn')
    connection, other = context.Pipe()
    process = context.Process(target=serve_field_way, args=(other, args, count))
    process.start()
    other.close()  # a process that died is then the end of the connection

    def call() -> None:
        connection.send('go')
        connection.recv()

    try:
        yield call
    finally:
        connection.close()
        process.join()


def serve_field_way(connection: Connection, args: argparse.Namespace, count: int) -> None:
    """Train as the field does whenever told to."""
    if args.same_allocator:
        keep_memory()
    options = {'fused': False, 'foreach': False}
    plain = {'model_kwargs': {'plain_fusion': True}, 'amp': False, 'channels_last': False, 'torchcompile': False}
    with training(args, images=args.images, cache='ram', opt_kwargs=options, **plain) as run:
        run.task.train()
        loader = per_image(run, count, args.workers)
        with suppress(EOFError):
            while connection.recv():
                for images, labels in loader:
                    inputs = tuple(images.to(args.device).chunk(2))
                    (result,) = train_step(run, [Batch(0, inputs, labels.to(args.device), [])])
                    result['loss'].item()
                finish(args.device)
                connection.send('done')


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of a step's time by kind of operation; the kernels of a CUDA graph would belong to none."""
    with training(args, images=args.batch_size // (2 * args.identities), cuda_graphs=False) as run:
        (batch,) = drawn(run, 1)
        run.task.train()
        train_step(run, [batch])
        with torch.profiler.profile() as profiler:
            train_step(run, [batch])
            finish(args.device)
    on_gpu = args.device.type == 'cuda'
    times = dict.fromkeys([*OPERATIONS, 'the rest'], 0.0)
    operators = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    for event in operators:  # kernels' own entries count a second time what their operators do
        kinds = (kind for kind, names in OPERATIONS.items() if any(name in event.key for name in names))
        times[next(kinds, 'the rest')] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {'profile': {kind: value / sum(times.values()) for kind, value in times.items()}}


def saving(args: argparse.Namespace) -> dict[str, float]:
    """An optimiser step on two batches with what saves memory, against one without."""
    images = args.batch_size // (2 * args.identities)
    with (
        training(args, images, grad_accum_steps=2) as run,
        training(args, images, grad_accum_steps=2, grad_checkpointing=True) as checkpointing,
        training(args, images, grad_accum_steps=2, cached_triplet=True) as cached,
    ):
        group = drawn(run, 2)
        runs = {'plain': run, 'checkpointing': checkpointing, 'cached': cached}
        for each in runs.values():
            each.task.train()
        works = {name: lambda each=each: train_step(each, group) for name, each in runs.items()}
        times = alternate(works, args.device, args.repeats)
    return {
        'checkpointing_over_step': ratio(times, 'checkpointing', 'plain'),
        'cached_triplet_over_step': ratio(times, 'cached', 'plain'),
    }


def other_batches(args: argparse.Namespace) -> dict[str, Any]:
    """Rate and peak memory of other batch sizes; on a CPU the memory is the process's, so give one size at a time."""
    sizes = {}
    for size in args.batches:
        args_of_size = argparse.Namespace(**{**vars(args), 'batch_size': size})
        with training(args_of_size, images=size // (2 * args.identities)) as run:
            if args.device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats(args.device)
            (batch,) = drawn(run, 1)
            run.task.train()
            works = {'step': lambda run=run, batch=batch: train_step(run, [batch])}
            times = alternate(works, args.device, args.repeats, unsettled(run))
            memory = peak_memory(args.device)
        sizes[size] = {'images_per_s': size / statistics.median(times['step']), 'peak_gib': memory / 2**30}
    return {'batches': sizes}


def table(result: dict[str, Any]) -> str:
    """Markdown of what was measured."""
    rows = (
        ('data_images_per_s', 'augmented batches from the store, images/s', '{:,.0f}'),
        ('data_ms_per_batch', '... ms per batch', '{:.2f}'),
        ('chain_images_per_s', 'PIL and torchvision for each image, in workers, images/s', '{:,.0f}'),
        ('data_over_chain', '... times faster', '{:.1f}'),
        ('bare_step_s', "a step of timm's bare ResNet, s", '{:.3f}'),
        ('step_s', 'a step with both stems, all branches and losses, s', '{:.3f}'),
        ('step_over_bare', '... times the bare one', '{:.2f}'),
        ('loop_over_step_rate', "the whole loop's rate, share of the step's", '{:.3f}'),
        ('images_per_s', 'the whole loop, images/s', '{:.1f}'),
        ('peers_images_per_s', "the field's way, images/s", '{:.1f}'),
        ('over_peers', '... times faster', '{:.2f}'),
        ('checkpointing_over_step', 'a step with --grad-checkpointing, times one without', '{:.2f}'),
        ('cached_triplet_over_step', '... with --cached-triplet over two batches', '{:.2f}'),
    )
    lines = [f'| {text} | {form.format(result[name])} |' for name, text, form in rows if name in result]
    for kind, share in result.get('profile', {}).items():
        lines.append(f'| share of a step: {kind} | {share:.1%} |')
    for size, measured in result.get('batches', {}).items():
        rate, memory = measured['images_per_s'], measured['peak_gib']
        lines.append(f'| batch of {size}: images/s, peak memory | {rate:,.1f}, {memory:.1f} GiB |')
    return '\n'.join(['| | |', '|---|---|', *lines])


def arguments() -> argparse.Namespace:
    """Those of the command line, completed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=['data', 'step', 'loop', 'peers'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--model', default='vireid_dml_r50')
    parser.add_argument('--size', nargs=2, type=int, default=[288, 144], metavar=('H', 'W'))
    parser.add_argument('--batch-size', type=int, default=64, help='images, half of them infrared')
    parser.add_argument('--batches', nargs='*', type=int, default=[], help='further batch sizes')
    parser.add_argument('--identities', type=int, default=8, help='in a batch')
    parser.add_argument('--steps', type=int, help='of an epoch that is measured; 4 on a CPU, 60 elsewhere')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--workers', type=int, default=default_workers())
    parser.add_argument('--same-allocator', action='store_true', help="this library's, for the field's way too")
    parser.add_argument('--torchcompile', action='store_true')
    parser.add_argument('--settings', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    args.device = resolve_device(args.device)
    args.steps = args.steps or (4 if args.device.type == 'cpu' else 60)
    # An epoch has one batch more than the images fill.
    args.images = max(1, args.steps - 1) * args.batch_size // (2 * args.identities)
    args.parts += ['batches'] if args.batches else []
    return args


def main() -> None:
    """Measure the parts that were asked for."""
    args = arguments()
    logging.basicConfig(level=logging.WARNING)
    keep_memory()
    measure = {
        'data': data,
        'step': step,
        'loop': loop,
        'peers': peers,
        'profile': profile,
        'saving': saving,
        'batches': other_batches,
    }
    result: dict[str, Any] = {
        'batch_size': args.batch_size,
        'size': args.size,
        'torchcompile': args.torchcompile,
        'settings': args.settings,
    }
    for part in dict.fromkeys(args.parts):
        result |= measure[part](args)
    publish(result, table(result), args.device, args.save)


if __name__ == '__main__':
    main()
