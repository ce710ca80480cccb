"""The task's losses are the paper's sum (eq. 13) with every switch of tables 1, 3 and 4."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from vireid_timm.hub.folder import save_model_folder
from vireid_timm.loss.by_name import FeatureLosses
from vireid_timm.loss.cross_modality_triplet import CrossModalityTriplet
from vireid_timm.loss.hetero_center import HeteroCenter
from vireid_timm.loss.prototype import PrototypeContrast
from vireid_timm.loss.triplet import WeightedRegularizedTriplet
from vireid_timm.training import task as task_module
from vireid_timm.training.task import ViReIDTask, infrared_rows

pytestmark = pytest.mark.usefixtures('one_thread')

LABELS = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])


def _model(name: str = 'vireid_dml_r10t') -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).train()


def _images(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 64, 32, generator=generator), torch.randn(4, 3, 64, 32, generator=generator)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Eq. 5 and 6, averaged over the batch."""
    p, q = p.softmax(1), q.softmax(1)
    both = (p * (p.log() - q.log())).sum(1) + (q * (q.log() - p.log())).sum(1)
    return 0.5 * both.mean()


def test_the_loss_is_the_papers_sum() -> None:
    model = _model()
    reference = _model()
    features, logits = reference.forward_branches(*_images())
    expected = sum(F.cross_entropy(logits[branch], LABELS) for branch in ('global', 'fusion', 'joint'))
    expected = expected + 0.6 * _kl(logits['joint'], logits['global']) + 1.8 * _kl(logits['joint'], logits['fusion'])
    expected = expected + WeightedRegularizedTriplet()(features, LABELS)

    result = ViReIDTask(model, verbose=False)(_images(), LABELS)

    torch.testing.assert_close(result['loss'], expected)
    assert set(result) == {'loss', 'output', 'id_global', 'id_fusion', 'id_joint', 'mutual', 'triplet'}
    torch.testing.assert_close(result['output'], logits['joint'])


@pytest.mark.parametrize('constant', ['none', 'partner', 'teacher'])
def test_gradients_reach_every_parameter_and_those_who_learn_from_others(constant: str) -> None:
    model = _model()
    ViReIDTask(model, verbose=False)(_images(), LABELS)['loss'].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    pair = _model()
    options = dict(id_branches=[], mutual='joint-to-global', mutual_constant=constant, loss={})
    ViReIDTask(pair, **options, verbose=False)(_images(), LABELS)['loss'].backward()
    teacher = pair.joint_head.fc.weight.grad
    assert teacher is None if constant == 'teacher' else teacher.abs().sum() > 0
    assert pair.global_head.fc.weight.grad.abs().sum() > 0
    assert pair.fusion_head.fc.weight.grad is None


@pytest.mark.parametrize('mode', ['none', 'global-to-fusion', 'joint-to-global', 'joint-to-fusion', 'joint-to-both'])
def test_table_4_modes(mode: str) -> None:
    _, logits = _model().forward_branches(*_images())
    pairs = {
        'none': 0.0,
        'global-to-fusion': 1.5 * _kl(logits['global'], logits['fusion']),
        'joint-to-global': 0.5 * _kl(logits['joint'], logits['global']),
        'joint-to-fusion': 1.5 * _kl(logits['joint'], logits['fusion']),
        'joint-to-both': 0.5 * _kl(logits['joint'], logits['global']) + 1.5 * _kl(logits['joint'], logits['fusion']),
    }
    result = ViReIDTask(_model(), mutual=mode, global_weight=0.5, fusion_weight=1.5, verbose=False)(_images(), LABELS)
    torch.testing.assert_close(torch.as_tensor(result.get('mutual', 0.0)), torch.as_tensor(pairs[mode]))


def test_table_3_without_identity_losses_of_the_auxiliary_branches() -> None:
    result = ViReIDTask(_model(), id_branches=['joint'], verbose=False)(_images(), LABELS)
    assert [name for name in result if name.startswith('id_')] == ['id_joint']


def test_the_baseline_has_one_branch_and_no_mutual_learning() -> None:
    result = ViReIDTask(_model('vireid_base_r10t'), verbose=False)(_images(), LABELS)
    assert set(result) == {'loss', 'output', 'id_global', 'triplet'}


def test_label_smoothing_is_a_separate_switch() -> None:
    _, logits = _model().forward_branches(*_images())
    result = ViReIDTask(_model(), smoothing=0.1, verbose=False)(_images(), LABELS)
    torch.testing.assert_close(result['id_joint'], F.cross_entropy(logits['joint'], LABELS, label_smoothing=0.1))


def test_checkpoint_state_has_the_networks_own_names_and_ema_is_a_network() -> None:
    model = _model()
    task = ViReIDTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    before = model.joint_head.fc.weight.detach().clone()
    with torch.no_grad():
        model.joint_head.fc.weight.add_(1.0)
    task.update_ema(step=2)  # the first step copies

    assert task.get_eval_model() is model
    assert set(task.get_checkpoint_state()['state_dict']) == set(model.state_dict())
    averaged = task.get_checkpoint_state(ema=True)['state_dict_ema']
    assert set(averaged) == set(model.state_dict())
    torch.testing.assert_close(averaged['joint_head.fc.weight'], before + 0.5)


@pytest.mark.parametrize('training', [True, False])
def test_cached_features_are_those_of_the_forward_pass_and_leave_no_trace(training: bool) -> None:
    model = _model().train(training)
    task = ViReIDTask(model, verbose=False).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = task.cache_features(_images())
    assert not features.requires_grad
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(features, model.forward_branches(*_images()).features.detach(), rtol=0, atol=0)
    assert (model.state_dict()['stem.visible.bn1.running_mean'] != before['stem.visible.bn1.running_mean']).any() == (
        training
    )


@pytest.mark.parametrize('weights', [{'triplet': 0.5}, {'triplet': 0.5, 'hetero_center_triplet': 2.0}])
def test_losses_across_accumulated_batches_are_those_of_the_joined_batch(weights: dict[str, float]) -> None:
    batches = [(_images(seed), (LABELS + seed) % 5) for seed in range(3)]
    model = _model().double()
    doubled = [((visible.double(), infrared.double()), labels) for (visible, infrared), labels in batches]
    task = ViReIDTask(model, id_branches=[], mutual='none', loss=weights, verbose=False)
    joined = task.join_triplet(
        [task.cache_features(inputs) for inputs, _ in doubled],
        [labels for _, labels in doubled],
        infrared_rows(*doubled[0][0]),
    )
    values = []
    for (inputs, labels), part in zip(doubled, joined):
        loss = task(inputs, labels, joined=part)['loss']
        (loss / len(doubled)).backward()
        values.append(loss.item())

    reference = _model().double()
    features = torch.cat([reference.forward_branches(*inputs).features for inputs, _ in doubled])
    arguments = features, torch.cat([labels for _, labels in doubled]), infrared_rows(*doubled[0][0]).repeat(3)
    expected = sum(FeatureLosses(weights)(*arguments).values())
    expected.backward()
    assert values == pytest.approx(3 * [expected.item()])
    for (name, value), other in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_other_losses_join_the_sum_and_know_the_modality() -> None:
    """Three visible images for one infrared one, as after CAJ's channel augmentation."""
    images, labels = (_images()[0], _images()[1][:2]), torch.tensor([0, 0, 1, 1, 0, 1])
    weights = {'hetero_center': 0.5, 'cross_modality_triplet': 2.0, 'prototype': 0.25, 'hetero_center_triplet': 0.0}
    task = ViReIDTask(_model(), loss=weights, verbose=False)
    result = task(images, labels)
    features, _ = _model().forward_branches(*images)
    infrared = torch.tensor([False] * 4 + [True] * 2)
    torch.testing.assert_close(result['hetero_center'], 0.5 * HeteroCenter()(features, labels, infrared))
    torch.testing.assert_close(result['cross_modality_triplet'], 2 * CrossModalityTriplet()(features, labels, infrared))
    names = {'id_global', 'id_fusion', 'id_joint', 'mutual', 'hetero_center', 'cross_modality_triplet', 'prototype'}
    assert set(result) == {'loss', 'output', *names} and result['prototype'] == 0, (
        'no prototypes before the first batch'
    )
    torch.testing.assert_close(result['loss'], sum(result[name] for name in names))

    reference = PrototypeContrast(5, task.get_eval_model().num_features)
    reference.update(features, labels)
    torch.testing.assert_close(task.prototype.prototypes, reference.prototypes)
    assert task(images, labels)['prototype'] > 0


def test_prototypes_move_in_training_only_and_belong_to_the_checkpoint() -> None:
    task = ViReIDTask(_model(), loss={'prototype': 1.0}, verbose=False)
    task.eval()(_images(), LABELS)
    assert not task.prototype.prototypes.any()
    task.train()(_images(), LABELS)
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'}
    other = ViReIDTask(_model(), loss={'prototype': 1.0}, verbose=False)
    other.load_checkpoint_state(**state)
    assert torch.equal(other.prototype.prototypes, task.prototype.prototypes) and task.prototype.prototypes.any()
    ViReIDTask(_model(), verbose=False).load_checkpoint_state(**state)  # a task without them has no use for them
    other.load_checkpoint_state(state['state_dict'])
    with pytest.raises(RuntimeError, match='size mismatch'):
        ViReIDTask(_model('vireid_base_r10t'), loss={'prototype': 1.0}, verbose=False).load_task_state(
            state['task_state']
        )


def test_joined_batches_are_of_one_size() -> None:
    with pytest.raises(ValueError, match=r'batches of one size, got \[6, 8\]'):
        ViReIDTask(_model(), verbose=False).join_triplet(
            [torch.rand(8, 3), torch.rand(6, 3)], [LABELS, LABELS[:6]], LABELS > 0
        )


def test_alone_there_is_nobody_to_share_with() -> None:
    model = _model()
    task = ViReIDTask(model, id_branches=['joint'], mutual='none', gather_features=True, verbose=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    task.convert_sync_batchnorm()
    assert task.prepare_distributed() is task
    task.share_running_statistics()
    assert list(model.modules()) == modules
    assert task.trainable_module.model is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    features = _model().forward_branches(*_images()).features
    torch.testing.assert_close(task(_images(), LABELS)['triplet'], WeightedRegularizedTriplet()(features, LABELS))
    with pytest.raises(ValueError, match="unknown dist_bn 'mean'; expected one of reduce, broadcast"):
        task.share_running_statistics('mean')


def test_synchronised_batch_norm_keeps_the_weights_and_saves_a_normal_model(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = _model()
    model.forward_branches(*_images())  # statistics that are not those of a fresh network
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(task_module, 'rank_and_world_size', lambda: (0, 2))
    task = ViReIDTask(model, device=torch.device('cuda'), verbose=False)
    task.convert_sync_batchnorm()

    kinds = {
        type(module).__name__
        for module in model.modules()
        if 'running_mean' in dict(module.named_buffers(recurse=False))
    }
    assert kinds == {'SyncBatchNorm', 'SyncBatchNormAct'}
    torch.testing.assert_close(dict(model.state_dict()), plain, rtol=0, atol=0)
    expected = model.eval()(*_images())
    save_model_folder(model, tmp_path / 'saved')
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, num_classes=5).eval()
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in loaded.modules())
    torch.testing.assert_close(loaded(*_images()), expected)


def test_a_model_without_classifier_and_an_unknown_branch_are_errors() -> None:
    with pytest.raises(ValueError, match='num_classes'):
        ViReIDTask(timm.create_model('vireid_dml_r10t'))
    with pytest.raises(ValueError, match="no branch 'local'.*global, fusion, joint"):
        ViReIDTask(_model(), id_branches=['local'])
