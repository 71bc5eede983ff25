"""Writes a twin of a set that tensorflow-datasets has prepared."""

import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from unimed_jax.data.twins.random import count, pick, words

CLASSES = ("clear", "with fluid")


def tfds(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes pictures with a class, a question, an answer and a patient.

    The files are as that package writes them without TensorFlow.
    """
    import tensorflow_datasets

    # A class registers itself by its name; it would be refused the second time.
    with tensorflow_datasets.core.registered.skip_registration():
        builder_class = _builder_class(tensorflow_datasets, records, rng)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        builder = builder_class(data_dir=scratch, file_format="array_record")
        builder.download_and_prepare()
        for file in Path(builder.data_dir).iterdir():
            shutil.move(file, folder / file.name)


def _builder_class(tensorflow_datasets, records: int, rng: np.random.Generator):
    """Makes the builder of the twin."""
    features = tensorflow_datasets.features

    class Twin(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            return tensorflow_datasets.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(
                    {
                        "image": features.Image(shape=(None, None, 3), encoding_format="png"),
                        "label": features.ClassLabel(names=list(CLASSES)),
                        "question": features.Text(),
                        "answer": features.Text(),
                        "patient": features.Text(),
                    }
                ),
            )

        def _split_generators(self, manager):
            return {name: self._generate_examples(split) for name, split in
                    (("train", "train"), ("validation", "val"), ("test", "test"))}  # fmt: skip

        def _generate_examples(self, split):
            for i in range(count(split, records)):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(picture, "PNG")
                about = {
                    "question": f"{words(rng)}?",
                    "answer": words(rng),
                    "patient": f"{split}{i // 2}",
                }
                yield i, {"image": picture.getvalue(), "label": pick(rng, CLASSES), **about}

    return Twin
