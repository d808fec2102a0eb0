"""Clients of three languages whom nobody groups: `clustered` finds them, and each group gets a model of its own."""

import json

import fedloom


def main() -> None:
    """Run the recipe on few clients and print who was found to belong together, and what new clients get."""
    result = fedloom.run(
        "clustered",
        overrides=[
            "data.num_clients=6",
            "data.num_examples=1800",
            "data.where={language: [en, es, sv]}",
            "cohort=full",
            "local.steps=6",
            "run.rounds=4",
            "run.baselines=[fedavg]",
            "evaluation={every: 0, generate: false}",
        ],
    )
    found = json.loads((result.folder / "clusters.json").read_text())
    profiles = json.loads((result.folder / "manifest.json").read_text())["profiles"]
    for client, cluster in sorted(found["assignment"].items(), key=lambda item: item[1]):
        print(f"{cluster}: {client} speaks {profiles[client]['language']}")
    print("adjusted Rand index:", found["agreement"]["language"]["adjusted_rand"])
    for name, one in {"clustered": result, **result.baselines}.items():
        print(f"{name:10} test loss {one.summary['final']['test/loss']:.3f}")


if __name__ == "__main__":
    main()
