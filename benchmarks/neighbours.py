"""What a vision tower knows beside what the decoder says: captions of the nearest training pictures, scored as captions of the model are.

Features are the class token and the mean patch token, end to end (N, 384), compared by cosine; `teacher` stands for EfficientNet-Lite0's
pooled features. A folder is a run of scripts/distill_vision.py or a checkpoint of MicroVLM, packed or not; `@112` after it sets the
pictures' side.

    python benchmarks/neighbours.py runs/nano_vision4@112 runs/nano_vision5 . teacher
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate_hf import score  # noqa: E402
from scripts.distill_vision import Student, embed, first_weights, load_split, teacher_features  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("towers", nargs="+", metavar="TOWER[@SIDE]", help="folder, or `teacher`")
    parser.add_argument("--train", nargs="+", default=["data/pictures/train.parquet", "data/icons.parquet"])
    parser.add_argument(
        "--data",
        nargs="+",
        default=[f"data/pictures/{name}.parquet" for name in ("validation_seen", "validation")],
    )
    options = parser.parse_args(arguments)
    pictures, rows = load_split(options.train, 224, include_copyleft=False)
    sets = {path: load_split(path, 224, include_copyleft=True) for path in options.data}
    student = Student(1, 1, 0.0)
    print(f"captions of the nearest of {len(rows)} training pictures\n")
    print("| features | set | concept | exact | word F1 | CIDEr |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for name in options.towers:
        folder, _, side = name.partition("@")
        if folder == "teacher":
            features = lambda x: teacher_features(x, 224)[1].float()  # noqa: E731
        else:
            weights = {k: v for k, v in first_weights(Path(folder)).items() if k.startswith("backbone.")}
            student.load_state_dict(weights, strict=False)
            features = lambda x, side=int(side or 224): embed(student, x, side)  # noqa: E731
        known = F.normalize(features(pictures), dim=-1)
        for path, (queries, wanted) in sets.items():
            nearest = (F.normalize(features(queries), dim=-1) @ known.mT).argmax(-1).tolist()
            concept = sum(rows[j]["concept"] == row["concept"] for j, row in zip(nearest, wanted)) / len(wanted)
            s = score([rows[j]["caption"] for j in nearest], [row["caption"] for row in wanted])
            print(
                f"| {name} | {path} | {concept:.3f} | {s['exact']:.3f} | {s['word_f1']:.3f} | {s['cider']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
