"""A pipeline of Apache Beam stores what one machine stores: twins of every source and layout."""

import shutil

import pytest
from support.reading import everything, layouts_of_twins

from unimed_jax import main as cli
from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data import image_shards
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.twins import write_twin

CONFIG = """
from unimed_jax.config import default_config
def get_config():
    config = default_config()
    config.data.sources = (dict(name="voc", path="{root}/voc"),)
    config.data.cache = "{root}/cache"
    return config
"""


def test_beam_is_an_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    write_twin("voc", tmp_path / "voc", records=3)
    (tmp_path / "c.py").write_text(CONFIG.format(root=tmp_path))
    assert cli.main(["data", "prepare", f"--config={tmp_path / 'c.py'}", "--beam="]) == 2
    assert "--beam needs the package apache-beam" in capsys.readouterr().err


@pytest.mark.slow
def test_beam_stores_what_one_machine_stores(tmp_path, monkeypatch, capsys):
    pytest.importorskip("apache_beam", reason="pip install 'unimed-jax[beam]'")
    from unimed_jax.data.beam import store_images

    sources = []
    for name, layout, options in layouts_of_twins():
        place = tmp_path / name / layout
        write_twin(name, place, records=6, layout=layout)
        sources.append(SourceConfig(name, f"{name}-{layout}", str(place), options=options))
    alone = open_sources(DataConfig(tuple(sources), cache=str(tmp_path / "alone")))
    monkeypatch.setattr(image_shards, "FIRST", 4)
    data = DataConfig(tuple(sources), cache=str(tmp_path / "beam"))
    store_images([data], [])
    monkeypatch.setattr(image_shards, "encoded", lambda *given: pytest.fail("stored again"))
    together = open_sources(data)
    shards = 0
    for one, two in zip(alone, together, strict=True):
        assert one.checksum == two.checksum and everything(one) == everything(two)
        for _, example in everything(one):
            for key in example.images:
                assert one.encoded(key) == two.encoded(key)
        shards += len(list(two.folder.glob("images-*")))
    assert len(together) > 20 and shards > len(together)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "voc/original", tmp_path / "voc/voc")
    (tmp_path / "c.py").write_text(CONFIG.format(root=tmp_path / "voc"))
    assert cli.main(["data", "prepare", f"--config={tmp_path / 'c.py'}", "--beam=", "--workers=0"]) == 0
    assert together[sources.index(next(s for s in sources if s.name == "voc"))].checksum[:12] in (
        capsys.readouterr().out
    )
