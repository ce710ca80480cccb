"""A run that is killed and told to stop again and again ends as the run that was not, bit for bit."""

import signal
from functools import partial
from pathlib import Path

from killing import Training, equal

from vireid_timm.run_folder import DAMAGED, LAST, has_checkpoint, load_checkpoint


def test_a_run_that_is_killed_at_bad_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Real processes: while the image store is written, while a checkpoint is written, then SIGTERM and Ctrl-C."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    whole.mkdir()
    killed.mkdir()
    undisturbed = Training(whole)

    training = Training(killed)
    assert training.kill_when(training.stores_images, signal.SIGKILL) == -signal.SIGKILL
    assert not has_checkpoint(training.run)

    training = Training(killed)
    assert training.kill_when(training.replaces_checkpoint(), signal.SIGKILL) == -signal.SIGKILL
    assert 'No checkpoint in' in training.said() and 'a new run' in training.said()
    assert has_checkpoint(training.run)

    places = []
    for number, status, name in ((signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')):
        training = Training(killed)
        written = training.checkpoints()
        assert training.kill_when(partial(next, written), number) == status
        said = training.said()
        assert f'Resuming {training.run} from epoch 0, step' in said
        assert f'stopped by {name}: resume with: vireid train --resume {training.run}' in said
        state = load_checkpoint(training.run)
        places.append((state['epoch'], state['state']['step']))
        assert f'Saved epoch 0, step {places[-1][1]}' in said
    assert places[0] < places[1] < (1, 0)

    training = Training(killed)
    assert training.wait() == 0, training.said()
    assert undisturbed.wait() == 0, undisturbed.said()
    assert equal(load_checkpoint(training.run), load_checkpoint(undisturbed.run))
    assert load_checkpoint(training.run)['epoch'] == 2
    assert sorted(path.name for path in training.run.iterdir()) == sorted(
        path.name for path in undisturbed.run.iterdir()
    )  # no leftovers of what was killed
    assert (training.run / LAST).exists() and not (training.run / DAMAGED).exists()
