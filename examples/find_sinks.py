"""Where are the sinks of SmolLM2-135M, and do they depend on the first token?

    python examples/find_sinks.py

printed, with Python 3.11 (the text of its manual differs a little between versions):

always (<|im_start|>)    sink attention 0.37, 147 of 270 heads above 0.3, value drain 0.28, peak 192 × after layer 11
never                    sink attention 0.39, 176 of 270 heads above 0.3, value drain 0.25, peak 180 × after layer 11
random                   sink attention 0.38, 157 of 270 heads above 0.3, value drain 0.26, peak 183 × after layer 11

The sink does not need a special token: any first token becomes one.
"""

import sinkscope as ss

model = ss.load_model("smollm2-135m")
for bos in ("always", "never", "random"):
    texts = ss.texts("prose", prompts=4, length=128, bos=bos)
    report = ss.scan(model, texts, metrics="core", progress=False)
    peak = report.mean("residual_peak")
    heads = (report.mean("sink_importance") > 0.3).sum()
    print(
        f"{report.settings.bos:24} sink attention {report.sink_attention.mean():.2f}, "
        f"{heads} of 270 heads above 0.3, value drain {report.value_drain.median():.2f}, "
        f"peak {peak.max():.0f} × after layer {peak.argmax()}"
    )
