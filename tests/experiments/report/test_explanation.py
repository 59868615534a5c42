"""The explanation of an adapter works on networks that are not the digit study's."""

import torch

import paramlora as pl
from experiments.analysis.explore import explore
from experiments.report.explanation import explanation
from experiments.report.page import page


def test_the_page_on_adapters_of_convolutions():
    """The page on a ResNet has figures, updates and explorer; the base's statistics stay."""
    from torchvision.models import resnet

    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    inputs, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 4
    pixels = (inputs * 50 + 100).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    convolutions = "layer2.*.conv?"
    attached = pl.attach(model, pl.LoRA(rank=2), convolutions, name="pets", hold_statistics=True)
    sites = ["layer2.0.conv1.weight", "layer2.0.conv2.weight"]
    assert [row.site for row in attached.sites] == sites
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.Adam(pl.parameters(model, "pets"), 1e-2)
    for _ in range(3):
        model.train()
        torch.nn.functional.cross_entropy(model(inputs[:6]), labels[:6] % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())

    loader, classes, tuned = [(inputs, labels)], ["ant", "bee", "cat", "dog"], [0, 1]
    sections = explanation(model, loader, classes, tuned=tuned, images=pixels, strengths=[0.0, 1.0])
    explored = explore(model, loader, classes, tuned=tuned, images=pixels, strengths=[0.0, 1.0])
    text = page("Pets", "Four classes.", sections, explored)
    assert 'id="explorer"' in text
    assert text.count("<figure>") >= 3
    for site in sites:
        assert f"<td>{site}</td><td>2</td>" in text
    assert f"<td>{', '.join(sites)}</td>" in text
