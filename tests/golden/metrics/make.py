"""Golden figures for src/train/metrics.rs, from scikit-learn.

    python3 make.py     writes golden.json beside this file

Needs numpy and scikit-learn (made with scikit-learn 1.7.2). DeLong's variance is computed here from its definition,
pair by pair, independently of the ranks that the program uses.
"""

import json
import pathlib

import numpy as np
from sklearn import metrics

CLASSES = ["cp", "covid19", "healthy"]
COVID = 1


def delong(scores, positive):
    x, y = scores[positive], scores[~positive]
    psi = (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])
    v10, v01 = psi.mean(axis=1), psi.mean(axis=0)
    return float(psi.mean()), float(np.sqrt(v10.var(ddof=1) / len(x) + v01.var(ddof=1) / len(y)))


def case(name, n, signal, step, seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, size=n, p=[0.4, 0.35, 0.25])
    logits = rng.normal(size=(n, 3))
    logits[np.arange(n), truth] += signal
    scores = np.exp(logits)
    scores /= scores.sum(axis=1, keepdims=True)
    scores = np.round(scores / step) * step  # ties
    predicted = scores.argmax(axis=1)
    covid, called = truth == COVID, predicted == COVID
    value, error = delong(scores[:, COVID], covid)
    assert abs(value - metrics.roc_auc_score(covid, scores[:, COVID])) < 1e-12
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, labels=[0, 1, 2], zero_division=0
    )
    return {
        "name": name,
        "class": truth.tolist(),
        "scores": [[float(f"{v:.6f}") for v in row] for row in scores],
        "confusion": metrics.confusion_matrix(truth, predicted, labels=[0, 1, 2]).tolist(),
        "accuracy": metrics.accuracy_score(truth, predicted),
        "covid_accuracy": metrics.accuracy_score(covid, called),
        "covid_auc": metrics.roc_auc_score(covid, scores[:, COVID]),
        "covid_auc_error": error,
        "covid_sensitivity": metrics.recall_score(covid, called),
        "covid_specificity": metrics.recall_score(~covid, ~called),
        "covid_precision": metrics.precision_score(covid, called),
        "covid_f1": metrics.f1_score(covid, called),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
        "macro_precision": metrics.precision_score(truth, predicted, average="macro"),
        "macro_sensitivity": metrics.recall_score(truth, predicted, average="macro"),
        "macro_auc": float(np.mean([metrics.roc_auc_score(truth == c, scores[:, c]) for c in range(3)])),
    }


def main():
    cases = [
        case("clear", 60, 2.5, 1e-6, 1),
        case("faint with ties", 80, 0.5, 0.05, 2),
        case("noise", 40, 0.0, 1e-6, 3),
    ]
    document = {"schema": "darnet.golden-metrics/1", "classes": CLASSES, "cases": cases}
    path = pathlib.Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(document) + "\n")


main()
