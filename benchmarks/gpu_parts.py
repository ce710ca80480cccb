"""The parts of gpu.py. Each sends its results one by one.

device          rate of a large bfloat16 product, and of copying
step            an optimiser step with all losses beside one of timm's bare ResNet, kernel by kernel and as a CUDA
                graph, at several batch sizes: ms, ratio, images/s, peak memory
loop            the training loop on images of SYSU-MM01's size: its rate beside that of steps alone, an epoch, and
                the recipe's 80 epochs projected
evaluation      images/s of extracting features, the 40 evaluations of SYSU-MM01, re-ranking beside the CPU
graphs          does a recorded step compute the same, and is a deterministic run the same when it is resumed?
profile         kernels that take the time of a step, and the share of the time without any
compile         how long compiling takes, and what a step takes then
compile-again   the same in another process, with what the first one has left on the disk
several         images/s of several trainings at once
"""

import argparse
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import evaluation_speed
import timm
import torch
import training_speed
from measuring import alternate, facts, finish, ratio, seconds
from torch.autograd import DeviceType
from training_speed import bare_step, drawn, epoch, training, unsettled

import vireid_timm
from vireid_timm.constants import RETRIEVALS
from vireid_timm.data.loader import Batch
from vireid_timm.evaluation.features import Extraction, extract, open_store
from vireid_timm.evaluation.reranking import ReRanking
from vireid_timm.run_folder import load_checkpoint
from vireid_timm.training import graph
from vireid_timm.training import run as run_module
from vireid_timm.training.run import Run
from vireid_timm.training.step import train_step

EPOCHS = 80  # of the recipe
FULL_SCALE = {
    'model': 'vireid_dml_r50',
    'settings': {},
    'batches': (64, 256, 512),
    'identities': 8,
    'repeats': 5,
    'steps': 10,  # in a row, timed together
    'equal_steps': 50,
    # The second does not fill a GPU, so several of it may pay.
    'several': ((4, 'vireid_dml_r50', (288, 144)), (4, 'vireid_dml_r10t', (128, 64))),
    'several_s': 5,
}
THIN = {'stem_width': 8, 'stem_type': 'deep_tiered', 'avg_down': True, 'channels': (8, 16, 24, 32)}
TINY_SCALE = {
    'model': 'vireid_dml_r10t',
    'settings': {'model_kwargs': {'resnet_args': THIN}, 'pad': 2, 'warmup_epochs': 0},
    'batches': (4,),
    'identities': 2,
    'repeats': 1,
    'steps': 4,
    'equal_steps': 5,
    'several': ((2, 'vireid_dml_r10t', (64, 32)),),
    'several_s': 0.2,
}

Send = Callable[[dict[str, Any]], None]


def run(part: str, args: argparse.Namespace, sender: Connection) -> None:
    """Do a part in this process; what it prints goes to a file."""
    with open(args.folder / f'{part}.log', 'w') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        PARTS[part](completed(args), sender.send)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what follows from them, as training_speed.py has them."""
    scale = TINY_SCALE if args.tiny else FULL_SCALE
    args = argparse.Namespace(**{**vars(args), **scale, 'torchcompile': False})
    args.device, args.batch_size = torch.device(args.device), args.batches[0]
    if args.device.type == 'cpu':  # to try the program: a plain call takes the place of a recording
        torch.set_num_threads(1)
        graph.CudaRecorder = PlainRecorder
        run_module.why_no_graph = lambda config, *_, **__: '' if config.cuda_graphs else '--no-cuda-graphs'
    return args


class PlainRecorder:
    """`CudaRecorder` without a GPU."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == 'cpu'

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


@contextmanager
def stepping(args: argparse.Namespace, graphs: bool, **settings: Any) -> Iterator[tuple[Run, Batch]]:
    """A run on a few rendered people that is ready to step, with its first batch."""
    gc.collect()
    if args.device.type == 'cuda':  # give back what is not used any more, and forget how much it was
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    with training(args, args.batch_size // (2 * args.identities), cuda_graphs=graphs, **settings) as run:
        if graphs != (run.graph is not None):
            raise RuntimeError('the steps were to become a CUDA graph, but do not')
        run.task.train()
        yield run, drawn(run, 1)[0]


def times_over(count: int, work: Callable[[], Any]) -> Callable[[], None]:
    """So many calls in a row."""

    def works() -> None:
        for _ in range(count):
            work()

    return works


def peak_gib(device: torch.device) -> float:
    """Memory of the GPU at its peak; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == 'cuda' else 0.0


def name_of(recorded: bool) -> str:
    """What the results call it."""
    return 'graph' if recorded else 'eager'


def device(args: argparse.Namespace, send: Send) -> None:
    """Which device it is, and its two rates."""
    if args.device.type == 'cuda':
        torch.zeros(1, device=args.device)  # or this is the error that says why not
    send({**facts(args.device), 'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version()})
    side = 128 if args.tiny else 8192
    matrix = torch.randn(side, side, device=args.device).bfloat16()
    product = times_over(args.steps, lambda: matrix @ matrix)
    taken = alternate({'product': product}, args.device, args.repeats)['product']
    send({'bf16_tflop_per_s': 2e-12 * args.steps * side**3 / statistics.median(taken)})
    source, target = (torch.empty(4 * side * side, dtype=torch.float32, device=args.device) for _ in range(2))
    taken = alternate({'copy': times_over(args.steps, lambda: target.copy_(source))}, args.device, args.repeats)['copy']
    send({'copy_tb_per_s': 2e-12 * args.steps * source.nbytes / statistics.median(taken)})


def step(args: argparse.Namespace, send: Send) -> None:
    """Steps beside bare ones that are treated the same way."""
    for size in args.batches:
        args.batch_size = size
        for recorded in (True, False):
            send({f'{size} {name_of(recorded)}': step_beside_bare(args, recorded)})


def step_beside_bare(args: argparse.Namespace, recorded: bool) -> dict[str, Any]:
    """Both steps at one batch size; the memory is that of the first."""
    with stepping(args, recorded) as (run, batch):
        times_over(unsettled(run), lambda: train_step(run, [batch]))()
        peak = peak_gib(args.device)
        bare = bare_step(run, len(run.data.class_map))
        times_over(unsettled(run), lambda: bare(batch))()
        works = {
            'ours': times_over(args.steps, lambda: train_step(run, [batch])),
            'bare': times_over(args.steps, lambda: bare(batch)),
        }
        times = alternate(works, args.device, args.repeats)
        precision = run.precision
    ours, plain = (statistics.median(times[name]) / args.steps for name in ('ours', 'bare'))
    return {
        'ms': 1000 * ours,
        'bare_ms': 1000 * plain,
        'over_bare': ratio(times, 'ours', 'bare'),
        'images_per_s': args.batch_size / ours,
        'peak_gib': peak,
        'precision': precision,
    }


def loop(args: argparse.Namespace, send: Send) -> None:
    """The loop on images of SYSU-MM01's size."""
    rendered = {'dataset': 'sysu_mm01', 'data_dir': str(args.images), 'dataset_kwargs': {}, 'cache': 'auto'}
    with training(args, 0, **rendered, images_per_modality=4) as run:
        run.task.train()
        (batch,) = drawn(run, 1)
        count = min(6 * args.steps, run.batches_per_epoch)
        works = {
            'steps': times_over(count, lambda: train_step(run, [batch])),
            'loop': lambda: epoch(run, count),
        }
        times = alternate(works, args.device, args.repeats)
        images = count * len(batch.rows)
        send(
            {
                'loop_over_step_rate': ratio(times, 'steps', 'loop'),
                'loop_images_per_s': images / statistics.median(times['loop']),
                'step_images_per_s': images / statistics.median(times['steps']),
                'graph': run.graph is not None,
            }
        )
        taken = seconds(lambda: epoch(run), args.device)
        send(
            {
                'epoch_batches': run.batches_per_epoch,
                'epoch_s': taken,
                'recipe_projected_min': EPOCHS * taken / 60,
                'peak_gib': peak_gib(args.device),
            }
        )


def evaluation(args: argparse.Namespace, send: Send) -> None:
    """Features of rendered test images, all evaluations of SYSU-MM01, and re-ranking."""
    model = timm.create_model(args.model, num_classes=0, **args.settings.get('model_kwargs', {})).to(
        args.device, memory_format=torch.channels_last
    )
    records = vireid_timm.create_dataset('sysu_mm01', str(args.images)).test
    for precision, dtype in (('bfloat16', torch.bfloat16), ('float32', None)):
        rate = extraction_rate(model, records, args, dtype)
        send({f'features, {precision}': {'images': len(records), 'images_per_s': rate}})
    dataset = evaluation_speed.sysu_mm01(**(dict(identities=12, test_identities=8) if args.tiny else {}))
    trial = vireid_timm.protocol_trials(dataset, 'all-multi')[0]
    for place in (args.device, torch.device('cpu')):
        repeats = 1 if place.type == 'cpu' else args.repeats
        send({f'40 evaluations on {place.type}': evaluation_speed.all_protocols(place, repeats, dataset)})
        features = evaluation_speed.random_features(dataset).to(place)
        send({f're-ranking on {place.type}': reranking_time(features[trial.query], features[trial.gallery])})


def extraction_rate(
    model: torch.nn.Module,
    records: vireid_timm.Records,
    args: argparse.Namespace,
    dtype: torch.dtype | None,
) -> float:
    """Images per second from the store to features."""
    extraction = Extraction(size=args.size, device=args.device, amp_dtype=dtype)
    store = open_store(model, records, extraction)
    work = {'extract': lambda: extract(model, records, store, store.intact(), extraction, RETRIEVALS)}
    return len(records) / statistics.median(alternate(work, args.device, args.repeats)['extract'])


def reranking_time(query: torch.Tensor, gallery: torch.Tensor) -> dict[str, Any]:
    """Seconds from features to the similarities of all queries, after a call that does not count."""
    times = alternate({'reranking': lambda: reranked(query, gallery)}, query.device, 1, int(query.is_cuda))
    return {'queries': len(query), 'gallery': len(gallery), 's': times['reranking'][0]}


def reranked(query: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Similarities of all queries, some at a time."""
    reranking = ReRanking(query, gallery)
    starts = range(0, len(query), 500)
    return torch.cat([reranking.similarity(slice(start, start + 500)) for start in starts])


def graphs(args: argparse.Namespace, send: Send) -> None:
    """Losses and weights after recorded steps, beside the distance between two ordinary runs; and resuming."""
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'  # for the deterministic runs; cuBLAS reads it once
    ordinary, again, recorded = (trained(args, graphs) for graphs in (False, False, True))
    for name, other in (('graph', recorded), ('eager again', again)):
        moved = (ordinary['weights'] - ordinary['start']).norm()
        difference = (ordinary['losses'] - other['losses']).abs() / ordinary['losses'].abs()
        found = {
            'largest_relative_loss': difference.max().item(),
            'first_relative_loss': difference[0].item(),
            'weights_over_their_way': ((ordinary['weights'] - other['weights']).norm() / moved).item(),
        }
        send({f'{args.equal_steps} steps, eager and {name}': found})
    with TemporaryDirectory() as folder:
        whole, resumed, eager = deterministic_runs(args, folder)
    send({'deterministic': {'resumed_equal': same(whole, resumed), 'eager_equal': same(whole, eager)}})


def trained(args: argparse.Namespace, graphs: bool) -> dict[str, torch.Tensor]:
    """The losses of some steps and the weights before and after them, on the CPU."""
    with stepping(args, graphs) as (run, batch):
        start = weights_of(run)
        losses = []
        for _ in range(args.equal_steps):
            (result,) = train_step(run, [batch])
            losses.append(result['loss'].clone())
        return {'start': start, 'losses': torch.stack(losses).double().cpu(), 'weights': weights_of(run)}


def weights_of(run: Run) -> torch.Tensor:
    """All weights in a row, on the CPU."""
    return torch.cat([value.detach().double().cpu().flatten() for value in run.model.parameters()])


def deterministic_runs(args: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """The last checkpoints of a whole run, one that was resumed after its first epoch, and one without graphs."""
    each = args.batch_size // (2 * args.identities)
    people = dict(identities=args.identities, test_identities=2, images_per_modality=5 * each, size=args.size)
    common = {
        **dict(dataset='synthetic', dataset_kwargs=people, model=args.model, input_size=[3, *args.size]),
        **dict(identities_per_batch=args.identities, images_per_modality=each, workers=0, output=folder),
        **dict(val_share=0.0, epochs=2, deterministic=True, device=str(args.device), **args.settings),
    }
    whole = vireid_timm.train({**common, 'experiment': 'whole'})
    half = vireid_timm.train({**common, 'experiment': 'half', 'epochs': 1})
    resumed = vireid_timm.train({'resume': str(half.folder), 'epochs': 2})
    eager = vireid_timm.train({**common, 'experiment': 'eager', 'cuda_graphs': False})
    for result in (whole, resumed, eager):
        yield load_checkpoint(Path(result.folder))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same weights."""
    return all(torch.equal(value, other['state_dict'][name]) for name, value in one['state_dict'].items())


def profile(args: argparse.Namespace, send: Send) -> None:
    """The kernels of a step; on a CPU its operations."""
    kind = DeviceType.CUDA if args.device.type == 'cuda' else DeviceType.CPU
    for recorded in (True, False):
        with stepping(args, recorded) as (run, batch):
            steps = times_over(args.steps, lambda: train_step(run, [batch]))
            times_over(unsettled(run), lambda: train_step(run, [batch]))()
            wall = statistics.median(seconds(steps, args.device) for _ in range(args.repeats))
            with torch.profiler.profile() as profiler:
                steps()
                finish(args.device)
        kernels = [event for event in profiler.key_averages() if event.device_type == kind and is_kernel(event)]
        times = {event: event.self_device_time_total or event.self_cpu_time_total for event in kernels}
        busy = sum(times.values()) / 1e6
        top = sorted(kernels, key=times.get, reverse=True)[:15]
        send(
            {
                name_of(recorded): {
                    'step_ms': 1000 * wall / args.steps,
                    'kernels_ms': 1000 * busy / args.steps,
                    'without_kernels': 1 - busy / wall,
                    'kernels_per_step': sum(event.count for event in kernels) / args.steps,
                    'top': {event.key[:80]: round(times[event] / 1e6 / busy, 4) for event in top},
                }
            }
        )
    send({'by operation, eager': training_speed.profile(args)['profile']})


def is_kernel(event: Any) -> bool:
    """Whether it is not a range that contains others, such as the optimiser's step."""
    return not getattr(event, 'is_user_annotation', False) and not event.key.startswith('Optimizer.')


def compiled(args: argparse.Namespace, send: Send) -> None:
    """The first compiled step, and later ones beside those of a graph."""
    with stepping(args, False, torchcompile=True) as (run, batch):
        first = seconds(lambda: train_step(run, [batch]), args.device)
        send({'first_step_s': first})
        with stepping(args, True) as (other, _):
            times_over(unsettled(other), lambda: train_step(other, [batch]))()
            works = {
                'compiled': times_over(args.steps, lambda: train_step(run, [batch])),
                'graph': times_over(args.steps, lambda: train_step(other, [batch])),
            }
            times = alternate(works, args.device, args.repeats)
    found = {name: 1000 * statistics.median(values) / args.steps for name, values in times.items()}
    gained = (found['graph'] - found['compiled']) / 1000
    send({f'{name}_ms': value for name, value in found.items()})
    send({'pays_after_steps': first / gained if gained > 0 else 'never'})


def several(args: argparse.Namespace, send: Send) -> None:
    """Several trainings at once, of the full method and of a small network."""
    for most, model, size in args.several:
        args.model, args.size = model, size
        for count in range(1, most + 1):
            rates = at_once(args, count)
            send({f'{model} {size[0]}x{size[1]}, {count} at once': {'images_per_s': sum(rates)}})


def at_once(args: argparse.Namespace, count: int) -> Sequence[float]:
    """The rate of each; all are ready before any of them starts to count."""
    context = get_context('fork')  # nothing here has used the GPU
    ready, go, rates = context.Semaphore(0), context.Event(), context.SimpleQueue()
    processes = [context.Process(target=one_of_several, args=(args, ready, go, rates)) for _ in range(count)]
    for process in processes:
        process.start()
    for _ in processes:
        while not ready.acquire(timeout=1):
            if any(process.exitcode for process in processes):
                raise RuntimeError('one of the trainings has failed')
    go.set()
    found = [rates.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def one_of_several(args: argparse.Namespace, ready: Any, go: Any, rates: Any) -> None:
    """Train until told to count, and then for some seconds."""
    with stepping(args, True) as (run, batch):
        steps = times_over(args.steps, lambda: train_step(run, [batch]))
        steps()
        finish(args.device)
        ready.release()
        go.wait()
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + args.several_s:
            steps()
            finish(args.device)
            count += args.steps
        rates.put(count * args.batch_size / (time.perf_counter() - start))


PARTS = {
    'device': device,
    'step': step,
    'loop': loop,
    'evaluation': evaluation,
    'graphs': graphs,
    'profile': profile,
    'compile': compiled,
    'compile-again': compiled,
    'several': several,
}
