"""How long: the work of a pass at a device's rates. Measured here by a calibration; of a device that is not here its
published peaks, times an efficiency that is an assumption."""

from collections.abc import Callable
from dataclasses import dataclass

from cola.plan.calibrate import Calibration, product_seconds
from cola.plan.devices import EFFICIENCY, LAUNCH_SECONDS, OF_BANDWIDTH, Device
from cola.plan.passes import Product, Work

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
STEP_PASSES = 10  # over what is trained: its norm and clipping, AdamW's reads and writes
STEP_OPERATIONS = 5  # of a trained tensor, likewise
KNOT_PASSES = 12  # over a matrix that a knot writes: read, added, accounted for


@dataclass(frozen=True)
class Rates:
    """Of a device: seconds of a product, FLOP/s of attention, bytes a second, seconds of an operation and of a
    byte of new memory."""

    product: Callable[[Product], float]
    attention: float
    bandwidth: float
    overhead: float
    fresh: float
    overlapped: bool  # whether operations are asked for while earlier ones compute
    said: str  # where this is from

    def of(self, work: Work) -> float:
        """Seconds of some work."""
        computing = sum(times * self.product(product) for product, times in work.products.items())
        computing += work.attention / self.attention + work.moved / self.bandwidth
        computing += work.fresh * self.fresh
        asking = work.operations * self.overhead
        return max(computing, asking) if self.overlapped else computing + asking

    def step(self, n_trained: int, n_tensors: int) -> float:
        """Seconds of an optimizer step, beside its passes."""
        moved, asking = 4 * STEP_PASSES * n_trained / self.bandwidth, STEP_OPERATIONS * n_tensors * self.overhead
        return moved + asking

    def knot(self, n_entries: int) -> float:
        """Seconds of writing matrices of so many entries in all."""
        return 4 * KNOT_PASSES * n_entries / self.bandwidth


def rates_of(device: Device, calibration: Calibration) -> Rates | None:
    """What a device does; None for this machine where nothing was measured on it."""
    if device.here:
        if not calibration.measured:
            return None

        def measured(product: Product) -> float:
            return product_seconds(calibration.products, product)

        said = f"calibrated on {calibration.device}"
        rates = calibration.attention, calibration.bandwidth, calibration.overhead, calibration.fresh
        return Rates(measured, *rates, device.kind == "cuda", said)
    peak, bandwidth = device.peak, OF_BANDWIDTH * device.bandwidth

    def published(product: Product) -> float:
        m, k, n, dtype = product
        moved = SIZES.get(dtype, 4) * (m * k + k * n + m * n)
        return max(2 * m * k * n / (EFFICIENCY * peak.get(dtype, peak["float32"])), moved / bandwidth)

    said = f"{device.title}'s data sheet, of which {EFFICIENCY:.0%} of the peak and {OF_BANDWIDTH:.0%} of the bandwidth"
    return Rates(
        published, EFFICIENCY * peak["bfloat16"] / 2, bandwidth, LAUNCH_SECONDS, 0.0, True, f"{said} are assumed"
    )
