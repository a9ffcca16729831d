"""The rows of the benchmark of forks are what they say, or there are none."""

import pytest

from sandbox_svc import bench_forks
from sandbox_svc.bench_service import Service


async def test_a_state_of_other_layers_than_its_row_says_ends_the_run(tmp_path, monkeypatch):
    tmp_path.chmod(0o711)
    monkeypatch.setattr(bench_forks, "_LAYERS", (1, 3))
    async with Service(tmp_path, *bench_forks.FLAGS) as service:
        root = await service.root_state()
        found = await bench_forks._by_layers(service, root)
        assert list(found) == ["1", "3"]
        assert len((await service.read(found["3"])).layers) == 3
        with pytest.raises(RuntimeError, match="1 layers: 3 told, 3 mounted"):
            await bench_forks._by_layers(service, found["3"])
        assert await service.live() == 0
        box = await service.create(root)
        assert await service.live() == 1
        await service.delete(box)
