"""From similarities to probabilities: is it the same person, and is the person in the gallery at all?

Two images: a logistic curve over the similarity (Platt, "Probabilistic Outputs for Support Vector Machines", 1999),
fitted by Newton's method (Lin et al., "A Note on Platt's Probabilistic Outputs", 2007). A probability holds at a prior,
the share of matches among the pairs that it was fitted to. Another gallery has another share, so Bayes' rule shifts
the curve.

Nobody: let F be the distribution of a query's best match, f its density and g the density of other people's images. If
the N images of a gallery are independent, the best similarity t of a search is N g(t) G(t)^(N-1) likely without the
person. With it, it is that times F(t), plus f(t) G(t)^N. So the odds that the person is there are those before the
search times F(t) + f(t) / (N g(t)) as long as G(t) is near 1. F is taken as normal, f / g as a logistic curve. But a
query that is hard to see is unlike everybody, its own person and strangers alike, so a low best similarity says less
than it would if images were independent: F is mixed with 1, as much as the fitted searches are most likely under.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

import numpy as np
import torch

from .verification import FPIRS, exceeded_by

FEWEST_QUERIES = 30  # with fewer, a calibration says little about other people
MOST_PAIRS = 500_000  # pairs of different people that a fit uses; of more it draws that many
HIGHEST_PRIOR = 0.5  # even in a gallery of one image
NEWTON_STEPS = 100
BINS = 15
FIRST = 10  # answers that somebody looks at


@dataclass(frozen=True)
class Calibration:
    """What similarities of one model mean, across the modalities.

    Attributes:
        slope: Of the log odds that a query and a gallery image show the same person, over their similarity.
        intercept: Of the same.
        prior: Share of matches among the fitted pairs; the curve holds at this prior.
        gallery_size: Images in the gallery of a fitted query that it does not ignore, mean.
        best_mean: Mean similarity of a query to its best match.
        best_deviation: Standard deviation of the same.
        uninformative: Share of 1 that is mixed into the distribution of best matches.
        ratio_slope: Of the log ratio of the densities of best matches and of other people's images, over similarity.
        ratio_intercept: Of the same.
        thresholds: Share of the searches for people who are not in the gallery (FPIR, as text: JSON has no other keys)
            -> the similarity that no larger share of them exceeds, in galleries of `gallery_size` images.
        settings: What decides the features: `weights` (fingerprint without classifiers), `features`, `flip_test`,
            `crops`, `size` and `centre`. With others the calibration means nothing.
        fitted_on: `dataset`, `options`, `split`, `protocols`, `draw`, and the numbers of `identities`, `queries`,
            `pairs` and `matches`.
    """

    slope: float
    intercept: float
    prior: float
    gallery_size: float
    best_mean: float
    best_deviation: float
    uninformative: float
    ratio_slope: float
    ratio_intercept: float
    thresholds: dict[str, float]
    settings: dict[str, Any]
    fitted_on: dict[str, Any]

    def probability(
        self,
        similarity: torch.Tensor,
        gallery_size: int | torch.Tensor | None = None,
        images_per_person: float | None = None,
    ) -> torch.Tensor:
        """Return the probability that two images of different modalities show the same person.

        Args:
            similarity: Inner product of their L2-normalised features, any shape.
            gallery_size: Images in the gallery: among more of them, a given one is less likely to show the person, so
                the prior is images_per_person / gallery_size. A number, or a tensor that fits the similarities. None
                for the prior of the fit.
            images_per_person: Mean number of a person's images in the gallery; None for that of the fit.

        Returns:
            Probabilities in float64, of the same shape.
        """
        log_odds = self.slope * similarity.double() + self.intercept
        if gallery_size is not None:
            size = torch.as_tensor(gallery_size, device=similarity.device).double().clamp(min=1)
            images = self.prior * self.gallery_size if images_per_person is None else images_per_person
            prior = (images / size).clamp(max=HIGHEST_PRIOR)
            log_odds = log_odds + torch.logit(prior) - math.log(self.prior / (1 - self.prior))
        return torch.sigmoid(log_odds)

    def nobody(self, top_similarity: torch.Tensor, gallery_size: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return the probability that a query's person is not in the gallery, if before the search it was one half.

        Args:
            top_similarity: The query's highest similarity to any image of the gallery, [Q].
            gallery_size: Images in the gallery; the more there are, the more similar is the nearest stranger. A
                number, or one for each query. None for the size of the fit.

        Returns:
            Probabilities in float64, [Q].
        """
        top = top_similarity.double()
        size = self.gallery_size if gallery_size is None else gallery_size
        size = torch.as_tensor(size, device=top.device).double().clamp(min=1)
        usual = torch.special.ndtr((top - self.best_mean) / self.best_deviation)
        usual = self.uninformative + (1 - self.uninformative) * usual
        ratio = torch.exp(self.ratio_slope * top + self.ratio_intercept) / size
        return 1 / (1 + usual + ratio)

    def mismatch(self, settings: dict[str, Any]) -> str:
        """Return the names of the settings that differ from those of the fit, empty if it applies; see `settings`."""
        names = [name for name, value in self.settings.items() if settings.get(name) != value]
        return ', '.join(names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'Calibration':
        """Read what `to_dict` returned, also after JSON.

        Raises:
            ValueError: A value is missing, unknown or of another kind.
        """
        hints = get_type_hints(cls)
        if not isinstance(values, dict) or set(values) != set(hints):
            known = list(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f'not a calibration of this version, which has {", ".join(hints)}; got {known}')
        for field in dataclasses.fields(cls):
            value, kind = values[field.name], get_origin(hints[field.name]) or hints[field.name]
            numbers = [value] if kind is float else value.values() if field.name == 'thresholds' else []
            if (kind is dict and not isinstance(value, dict)) or not all(map(_is_number, numbers)):
                raise ValueError(f'not a calibration: {field.name} cannot be {value!r}')
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Some queries with the gallery that they search.

    Attributes:
        similarity: [Q, G].
        match: Whether both show the same person, [Q, G] bool.
        ignore: Pairs that do not count, [Q, G] bool; None if there are none.
    """

    similarity: torch.Tensor
    match: torch.Tensor
    ignore: torch.Tensor | None = None


def fit_calibration(
    parts: Iterable[Pairs],
    num_pairs: int,
    settings: dict[str, Any],
    fitted_on: dict[str, Any],
    seed: int = 0,
) -> Calibration:
    """Fit a calibration to pairs of images of known people, in float64.

    Args:
        parts: The pairs, a part of the queries at a time.
        num_pairs: Number of pairs in all parts, ignored ones included; of more than `MOST_PAIRS` a sample is used.
        settings: See `Calibration`.
        fitted_on: See `Calibration`; the numbers of queries, pairs and matches are added.
        seed: Of the private generator that draws the sample.

    Raises:
        ValueError: There are too few queries, or pairs of the same person are not more similar than others.
    """
    generator = np.random.default_rng(seed)
    keep = min(1.0, MOST_PAIRS / max(1, num_pairs))
    seen = [_summary(part, keep, generator) for part in parts]
    columns = (np.concatenate(column) for column in zip(*seen, strict=True))
    matches, others, best, nearest, counts, present, absent = columns
    num_others, num_valid = int(counts.sum()), len(best)
    if num_valid < FEWEST_QUERIES or not num_others:
        raise ValueError(
            f'a calibration needs at least {FEWEST_QUERIES} queries with a match and images of other people, '
            f'got {num_valid} and {num_others} pairs of different people'
        )
    weight = num_others / len(others)
    slope, intercept = _logistic(matches, others, weight)
    ratio_slope, ratio_intercept = _logistic(best, others, weight)
    if min(slope, ratio_slope) <= 0:
        raise ValueError(
            'images of the same person are not more similar than those of different people, so no probability follows '
            'from these features'
        )
    num_pairs = len(matches) + num_others
    numbers = {'queries': len(nearest), 'pairs': num_pairs, 'matches': len(matches)}
    calibration = Calibration(
        slope=slope,
        intercept=intercept,
        prior=len(matches) / num_pairs,
        gallery_size=num_pairs / len(nearest),
        best_mean=float(best.mean()),
        best_deviation=max(float(best.std()), 1e-6),
        uninformative=0.0,
        ratio_slope=ratio_slope,
        ratio_intercept=ratio_intercept - math.log(len(best) / num_others),
        thresholds={str(fpir): exceeded_by(torch.from_numpy(nearest), fpir, len(nearest)) for fpir in FPIRS.values()},
        settings=settings,
        fitted_on={**fitted_on, **numbers},
    )
    return _most_likely(calibration, *map(torch.from_numpy, (present, absent)))


def _most_likely(calibration: Calibration, present: torch.Tensor, absent: torch.Tensor) -> Calibration:
    """Choose `uninformative`, in hundredths.

    Args:
        calibration: The rest of it.
        present: Highest similarity of each query in a gallery with its person, [Q].
        absent: The same without, [Q].
    """
    candidates = [dataclasses.replace(calibration, uninformative=share / 100) for share in range(101)]
    if not len(present):
        return calibration
    return max(candidates, key=lambda each: (1 - each.nobody(present)).log().mean() + each.nobody(absent).log().mean())


def reliability(
    parts: Iterable[Pairs], calibration: Calibration, images_per_person: float
) -> dict[str, dict[str, Any]]:
    """Compare predicted probabilities with what is true (Guo et al., arXiv:1706.04599).

    Args:
        parts: Pairs of known people, a part of the queries at a time.
        calibration: What predicts.
        images_per_person: Mean number of a person's images in the gallery.

    Returns:
        For `pairs` (all of them), `first` (the pairs of each query and its `FIRST` most similar images) and `nobody`
        (each query that has a match, once with and once without its person's images), the `count`; the expected
        calibration error `ece`, the mean over `BINS` equally wide bins of the difference between mean probability and
        share of truths, weighted by count; the mean `log_loss` in nats and that of a constant, `constant_log_loss`; and
        the `bins`: `count`, mean `probability` and `share` of truths, both None for an empty bin.
    """
    totals = {'pairs': 0, 'first': 0, 'nobody': 0}
    for part in parts:
        for name, predicted in _predictions(part, calibration, images_per_person).items():
            totals[name] = totals[name] + _binned(*predicted)
    return {name: _scores(total.cpu().numpy()) for name, total in totals.items()}


def _predictions(
    part: Pairs,
    calibration: Calibration,
    images_per_person: float,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return probabilities and truths of the pairs, the first answers, and the searches for people who may be there."""
    counted = torch.ones_like(part.match) if part.ignore is None else ~part.ignore
    size = counted.sum(dim=1)
    probability = calibration.probability(part.similarity, size[:, None], images_per_person)
    similarity = part.similarity.double().masked_fill(~counted, -math.inf)
    first = similarity.topk(min(FIRST, similarity.shape[1]), dim=1)
    kept = first.values > -math.inf
    match = part.match & counted
    nearest = similarity.masked_fill(match, -math.inf).amax(dim=1)
    both = match.any(dim=1) & (nearest > -math.inf)
    top = torch.cat([similarity.amax(dim=1)[both], nearest[both]])
    absent = torch.arange(len(top), device=top.device) >= len(top) // 2
    return {
        'pairs': (probability[counted], part.match[counted]),
        'first': (probability.gather(1, first.indices)[kept], part.match.gather(1, first.indices)[kept]),
        'nobody': (calibration.nobody(top, size[both].repeat(2)), absent),
    }


def _binned(probability: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sum up count, probability, truths and log loss by bin, [4, BINS] float64."""
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    certain = torch.where(truth, probability, 1 - probability).clamp(min=1e-12)
    columns = torch.ones_like(probability), probability, truth.double(), -certain.log()
    return torch.stack([torch.bincount(bins, weights=column, minlength=BINS) for column in columns])


def _scores(total: np.ndarray) -> dict[str, Any]:
    count, probability, truths, loss = total
    number, share = count.sum(), truths.sum() / max(1, count.sum())
    entropy = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
    filled = [None if not n else (float(p / n), float(t / n)) for n, p, t in zip(count, probability, truths)]
    return {
        'count': int(number),
        'ece': float(np.abs(probability - truths).sum() / number) if number else None,
        'log_loss': float(loss.sum() / number) if number else None,
        'constant_log_loss': entropy,
        'bins': {
            'count': count.astype(int).tolist(),
            'probability': [bin and bin[0] for bin in filled],
            'share': [bin and bin[1] for bin in filled],
        },
    }


def _summary(part: Pairs, keep: float, generator: np.random.Generator) -> Sequence[np.ndarray]:
    """Reduce a part to what a fit needs, in float64.

    Returns:
        Similarities of the matches, of a sample of the other pairs, of each query's best match and of the nearest other
        person for each query; the number of other pairs of each query; and of the queries with both the highest
        similarity with their person's images and without.
    """
    counted = torch.ones_like(part.match) if part.ignore is None else ~part.ignore
    match, other = part.match & counted, ~part.match & counted
    similarity = part.similarity.double()
    best = similarity.masked_fill(~match, -math.inf).amax(dim=1)
    nearest = similarity.masked_fill(~other, -math.inf).amax(dim=1)
    has_match, has_other = match.any(dim=1), other.any(dim=1)
    both = has_match & has_other
    columns = similarity[match], similarity[other], best[has_match], nearest[has_other], other.sum(dim=1)
    columns += torch.maximum(best, nearest)[both], nearest[both]
    matches, others, *rest = (column.cpu().numpy() for column in columns)
    if keep < 1 and len(others):  # at least one, or the last query would have no weight
        others = others[generator.integers(len(others), size=max(1, round(keep * len(others))))]
    return matches, others, *rest


def _logistic(positive: np.ndarray, negative: np.ndarray, weight: float) -> tuple[float, float]:
    """Return slope and intercept of the log odds of being positive; each negative value counts `weight` times.

    Platt's targets keep the curve finite where a similarity separates both: they are those of one more positive and
    one more negative value, each equally likely to be either.
    """
    values = np.concatenate([positive, negative])
    centre, scale = values.mean(), max(values.std(), 1e-12)
    design = np.stack([(values - centre) / scale, np.ones_like(values)], axis=1)
    num_positive, num_negative = len(positive), weight * len(negative)
    target = np.repeat([(num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2)], [num_positive, len(negative)])
    weights = np.repeat([1.0, weight], [num_positive, len(negative)])

    def loss(line: np.ndarray) -> float:
        log_odds = design @ line
        return float(weights @ (np.logaddexp(0, log_odds) - target * log_odds))

    line = np.array([0.0, math.log((num_positive + 1) / (num_negative + 1))])
    for _ in range(NEWTON_STEPS):
        probability = np.exp(-np.logaddexp(0, -(design @ line)))
        gradient = design.T @ (weights * (probability - target))
        curvature = (design * (weights * probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        size, before, gain = 1.0, loss(line), 1e-4 * gradient @ step
        while loss(line - size * step) > before - size * gain and size > 1e-15:
            size /= 2
        line = line - size * step
        if np.abs(gradient).max() < 1e-10 * weights.sum():
            break
    slope = line[0] / scale
    return float(slope), float(line[1] - slope * centre)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
