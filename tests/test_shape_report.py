"""The table of layers that VGG16 does not have."""

from __future__ import annotations

from vggfast.bench import shape_report


def test_layers_of_other_networks_are_beside_the_faster_of_torchs_layouts():
    def of(case, **seconds):
        found = [{"label": label.replace("_", " "), "seconds": {"median": t}} for label, t in seconds.items()]
        return {
            "id": case,
            "contenders": [{**c, "label": c["label"].replace("channels last", "channels_last")} for c in found],
        }

    groups = [
        of("64to12at112 forward fp32 batch 8", vggfast=0.004, torch_channels_last=0.012, torch_NCHW=0.010),
        of("64to12at112 grad_weight fp32 batch 8", vggfast=0.008, torch_channels_last=0.006, torch_NCHW=0.010),
        of("3to16at224 forward fp32 batch 8", vggfast=0.004),  # its rivals failed
    ]
    run = {"versions": {"vggfast": "0.1.0", "torch": "2.11.0"}, "settings": {"threads": 2}}
    data = {"device": {"cpu": "Some CPU", "cores": 2}, "runs": {"2026-11-30T00:00:00Z": run}, "groups": groups}
    lines = shape_report.markdown(data).splitlines()
    assert lines[-1] == "| 64 → 12, 112×112 | 8 | 4 ms, **2.50×** |  | 8 ms, **0.75×** |"
    assert lines[-2].startswith("|---|")  # no line for what has nothing to say
    assert shape_report.markdown({**data, "groups": []}) == shape_report.NOTHING
