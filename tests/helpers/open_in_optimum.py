"""Run without optin: opens exported directories in sentence-transformers and optimum, and says what they give.

Usage: python -m helpers.open_in_optimum FOLDER RESULTS.npz
"""

import sys
from pathlib import Path

import numpy as np

TEXTS = ["good", "the film is very good", "dull a film", "fine"]
INT8 = "model_qint8_avx512_vnni.onnx"


def embeddings(folder: Path, file: str) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs={"file_name": file})
    return model.encode(TEXTS)


def outputs(name: str, folder: Path) -> np.ndarray:
    import optimum.onnxruntime
    from transformers import AutoTokenizer

    model = getattr(optimum.onnxruntime, name).from_pretrained(folder)
    return model(**AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt"))[0].numpy()


if __name__ == "__main__":
    from helpers.open_without_optin import NoOptin

    sys.meta_path.insert(0, NoOptin())
    work = Path(sys.argv[1])
    np.savez(
        sys.argv[2],
        embeddings=embeddings(work / "sentences", "model.onnx"),
        int8=embeddings(work / "sentences", INT8),
        hidden=outputs("ORTModelForFeatureExtraction", work / "sentences"),
        logits=outputs("ORTModelForSequenceClassification", work / "classifier"),
    )
