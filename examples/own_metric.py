"""A user-defined metric: how heavy-tailed are the values, and is the sink's value an outlier?

    python examples/own_metric.py

The class is enough: naming its metric registers it, and the field appears in the report, its frame,
file, figures and page. It is measured inside the hook, in the same forward pass.
"""

import sinkscope as ss


class ValueKurtosis(ss.Observer, metric="value_kurtosis", reads="value"):
    fields = {
        "value_kurtosis": ss.measured(
            "prompt layer kv_head", unit="1", about="kurtosis of the value states over positions"
        )
    }

    def observe(self, x, batch):  # x: [prompt position kv_head d_head] of one layer
        x, real = x.float(), batch.mask[:, :, None, None]
        count = batch.mask.sum(dim=1)[:, None] * x.shape[-1]
        mean = (x * real).sum(dim=(1, 3)) / count
        apart = (x - mean[:, None, :, None]) * real
        variance = apart.square().sum(dim=(1, 3)) / count
        return {"value_kurtosis": (apart**4).sum(dim=(1, 3)) / count / variance**2}


texts = ss.texts("prose", prompts=8, length=128)
report = ss.scan("smollm2-135m", texts, metrics=["core", "value_kurtosis"], progress=False)
mean, low, high = report.interval("value_kurtosis")
layer, head = divmod(int(mean.argmax()), mean.shape[1])
print(
    f"largest: layer {layer}, KV head {head}: {mean[layer, head]:.1f} "
    f"[{low[layer, head]:.1f}, {high[layer, head]:.1f}]; a normal distribution has 3"
)
print(report.to_frame("value_kurtosis").head(3).to_string(index=False))
