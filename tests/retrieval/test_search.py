import torch

from vireid_timm.retrieval.search import nearest


def test_nearest_is_an_argsort_of_the_similarities() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(5, 7, generator=generator), torch.randn(11, 7, generator=generator)
    order = nearest(queries, gallery, 4)
    for row in range(5):
        similarity = [float(queries[row] @ image) for image in gallery]
        assert order[row].tolist() == sorted(range(11), key=lambda column: -similarity[column])[:4]
    assert nearest(queries, gallery[:3], 10).shape == (5, 3)
