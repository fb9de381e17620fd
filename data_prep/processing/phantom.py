"""A physics-flavoured breast ultrasound phantom: the images a small linear probe would see of invented anatomy.

The chain is the usual one of simulated B-mode images (Jensen's Field II and Dillenseger et al. 2009, "Fast simulation of
ultrasound images from a CT volume"): a map of echogenicity times random complex scatterers, blurred by a point spread
function that widens away from the focus; loss accumulated along each beam, so that shadows and enhancement behind a
lesion follow from its attenuation and need no drawing; time gain compensation; envelope; log compression.

Everything follows from `(seed, patient, view)`: the anatomy from `(seed, patient)`, the probe's position, the tilt and the
speckle from all three.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
Complex = NDArray[np.complexfloating]

DEPTH_MM = 40.0
SKIN, FAT, GLAND, RETRO_FAT, MUSCLE, CHEST = range(6)
# Echogenicity (dB) and attenuation (dB/mm, both ways, about 0.7..2 dB/cm/MHz at 7 MHz scaled to a comfortable image).
ECHO_DB = np.array([6.0, -17.0, -4.0, -18.0, -13.0, -30.0], dtype=np.float32)
LOSS_DB_MM = np.array([0.9, 0.6, 1.0, 0.6, 1.0, 1.2], dtype=np.float32)
LABELS = ("benign", "malignant", "normal")


@dataclass(frozen=True)
class Scanner:
    """One machine and its preset.

    Attributes:
        name: the word for it in prompts.
        axial_mm, lateral_mm: standard deviations of the point spread function at the focus.
        focus_mm: depth of the narrowest beam.
        dynamic_range_db: from black to white.
        gain_db: added before compression.
        width_mm: width of the field of view; with `DEPTH_MM` it gives the aspect of the image.
        border: pixels of black frame on every side at 256 pixels of height, with a depth scale on the right.
    """

    name: str
    axial_mm: float
    lateral_mm: float
    focus_mm: float
    dynamic_range_db: float
    gain_db: float
    width_mm: float
    border: int


SCANNERS = (
    Scanner("scanner A", 0.16, 0.30, 16.0, 58.0, 0.0, 40.0, 0),
    Scanner("scanner B", 0.24, 0.48, 22.0, 46.0, 3.0, 52.0, 10),
)


@dataclass(frozen=True)
class Lesion:
    """A lesion as a closed curve around a centre.

    Attributes:
        depth_mm, lateral_mm: the centre; lateral is measured from the middle of the probe.
        radius_mm: mean radius.
        aspect: height over width.
        angle: rotation in radians.
        ripple: (harmonics, 2) amplitude relative to the radius and phase of each harmonic, from the 2nd on.
        spikes: (n, 3) angle, relative length and angular width of each spicule.
        echo_db, loss_db_mm: echogenicity and attenuation inside.
        rim_db: brightness of the capsule (benign) or of the echogenic halo (malignant).
        rim_mm: thickness of that rim.
    """

    depth_mm: float
    lateral_mm: float
    radius_mm: float
    aspect: float
    angle: float
    ripple: Array
    spikes: Array
    echo_db: float
    loss_db_mm: float
    rim_db: float
    rim_mm: float


@dataclass(frozen=True)
class Patient:
    """Anatomy and scanner of one patient.

    Attributes:
        label: `benign`, `malignant` or `normal`.
        boundaries_mm: (5,) mean depth of the lower boundary of skin, fat, gland, retromammary fat and muscle.
        waves: (5, 4, 3) amplitude (mm), wavelength (mm) and phase of each boundary's undulation.
        lesion: None for a normal breast.
    """

    label: str
    scanner: Scanner
    boundaries_mm: Array
    waves: Array
    lesion: Lesion | None


def patient(seed: int, number: int, label: str) -> Patient:
    """Return the anatomy of one patient; the scanner follows from the patient as well.

    Raises:
        ValueError: `label` is not in `LABELS`.
    """
    if label not in LABELS:
        raise ValueError(f"label {label!r} is not one of {LABELS}")
    rng = np.random.default_rng([seed, number, 0])
    scanner = SCANNERS[int(rng.integers(len(SCANNERS)))]
    thickness = rng.uniform([1.3, 3.5, 10.0, 1.5, 5.0], [2.2, 8.0, 17.0, 4.0, 8.0])
    amplitude = rng.uniform(0.0, 1.0, (5, 4)) * np.array([0.15, 0.8, 1.0, 0.8, 0.5])[:, None]
    waves = np.stack([amplitude, rng.uniform(10, 45, (5, 4)), rng.uniform(0, 2 * np.pi, (5, 4))], axis=-1)
    boundaries = np.cumsum(thickness)
    centre = float(rng.uniform(boundaries[1] + 1.0, boundaries[2] - 1.0))
    lesion = _lesion(rng, label, centre) if label != "normal" else None
    return Patient(label, scanner, boundaries.astype(np.float32), waves.astype(np.float32), lesion)


def _lesion(rng: np.random.Generator, label: str, depth_mm: float) -> Lesion:
    """Return a benign (smooth, wider than tall, often a cyst) or malignant (spiculated, irregular, absorbing) lesion."""
    malignant = label == "malignant"
    harmonics = np.arange(2, 10)
    scale = (0.16 if malignant else 0.045) / harmonics ** (0.6 if malignant else 1.2)
    ripple = np.stack([scale * rng.normal(size=8), rng.uniform(0, 2 * np.pi, 8)], axis=-1)
    count = int(rng.integers(7, 14)) if malignant else 0
    spikes = np.stack(
        [rng.uniform(0, 2 * np.pi, count), rng.uniform(0.25, 0.75, count), rng.uniform(0.07, 0.16, count)], axis=-1
    )
    cyst = not malignant and rng.random() < 0.5
    between = rng.uniform
    return Lesion(
        depth_mm=depth_mm,
        lateral_mm=float(between(-7.0, 7.0)),
        radius_mm=float(between(2.8, 6.0) if malignant else between(2.2, 6.5)),
        aspect=float(between(0.85, 1.35) if malignant else between(0.5, 0.85)),
        angle=float(between(-0.35, 0.35)),
        ripple=ripple.astype(np.float32),
        spikes=spikes.astype(np.float32),
        echo_db=float(between(-38, -30) if cyst else between(-24, -18)),
        loss_db_mm=float(between(2.0, 2.9) if malignant else between(0.0, 0.1) if cyst else between(0.3, 0.5)),
        rim_db=float(between(3, 6) if malignant else between(1, 4)),
        rim_mm=float(between(0.8, 1.6) if malignant else between(0.25, 0.5)),
    )


def render(
    subject: Patient, seed: int, number: int, view: int, height: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return one view of a patient.

    Args:
        subject: what `patient(seed, number, …)` returned.
        seed: that seed; with `number` and `view` it keys the speckle.
        number: that patient.
        view: 0, 1, …: the same lesion from another place and angle, with other speckle.
        height: pixels; the width follows from the scanner's field of view.

    Returns:
        image (H, W) uint8 and mask (H, W) uint8, 0 or 1, both with the scanner's border.
    """
    rng = np.random.default_rng([seed, number, 1 + view])
    scanner = subject.scanner
    border = round(scanner.border * height / 256)
    rows = height - 2 * border
    columns = round(rows * scanner.width_mm / DEPTH_MM)
    pixel_mm = DEPTH_MM / rows
    depth, lateral = np.meshgrid(
        (np.arange(rows, dtype=np.float32) + 0.5) * pixel_mm,
        (np.arange(columns, dtype=np.float32) + 0.5 - columns / 2) * pixel_mm,
        indexing="ij",
    )
    shift = float(rng.uniform(-4.0, 4.0))
    echo_db, loss = _tissue(subject, depth, lateral + shift, rng, pixel_mm)
    mask = np.zeros((rows, columns), dtype=np.uint8)
    if subject.lesion is not None:
        tilt, squeeze = float(rng.normal(0.0, 0.15)), float(rng.uniform(0.92, 1.08))
        excess = _excess_radius(subject.lesion, depth, lateral + shift, tilt, squeeze)
        echo_db, loss = _insert_lesion(subject.lesion, echo_db, loss, excess, rng, pixel_mm)
        mask = (excess < 0).astype(np.uint8)
    image = _b_mode(echo_db, loss, scanner, depth, rng, pixel_mm)
    return _framed(image, border, scale=True), _framed(mask, border, scale=False)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, float]) -> Array:
    """Return Gaussian noise (rows, columns) blurred by `sigma` pixels and brought back to unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return np.asarray(noise / (noise.std() + 1e-6), dtype=np.float32)


def _tissue(
    subject: Patient, depth: Array, lateral: Array, rng: np.random.Generator, pixel_mm: float
) -> tuple[Array, Array]:
    """Return echogenicity (dB) and attenuation (dB/mm) of the layered breast, both (rows, columns)."""
    amplitude, length, phase = (subject.waves[..., i][:, :, None] for i in range(3))
    undulation = (amplitude * np.sin(2 * np.pi * lateral[0] / length + phase)).sum(axis=1)
    lower = subject.boundaries_mm[:, None] + undulation
    layer = (depth[None] > lower[:, None, :]).sum(axis=0)
    echo_db, loss = ECHO_DB[layer].copy(), LOSS_DB_MM[layer]
    shape = depth.shape
    lobules = _smooth_noise(rng, shape, (1.2 / pixel_mm, 2.2 / pixel_mm))
    clouds = _smooth_noise(rng, shape, (2.5 / pixel_mm, 4.0 / pixel_mm)) * 2.0
    septa = np.exp(-((lobules / 0.13) ** 2)) * 12.0
    ducts = _smooth_noise(rng, shape, (0.45 / pixel_mm, 1.6 / pixel_mm)) * 3.2
    fibres = _smooth_noise(rng, shape, (0.22 / pixel_mm, 4.5 / pixel_mm)) * 4.5
    fat = (layer == FAT) | (layer == RETRO_FAT)
    echo_db += (
        clouds + np.where(fat, septa, 0) + np.where(layer == GLAND, ducts, 0) + np.where(layer == MUSCLE, fibres, 0)
    )
    edges = np.abs(depth[None] - lower[:, None, :])
    fascia = np.exp(-((edges / 0.28) ** 2)) * np.array([4.0, 5.0, 7.0, 9.0, 14.0])[:, None, None]
    return (echo_db + fascia.sum(axis=0)).astype(np.float32), loss


def _excess_radius(lesion: Lesion, depth: Array, lateral: Array, tilt: float, squeeze: float) -> Array:
    """Return the distance (mm, along the ray from the centre) beyond the lesion's contour; negative inside."""
    down, across = depth - lesion.depth_mm, lateral - lesion.lateral_mm
    cos, sin = np.cos(lesion.angle + tilt), np.sin(lesion.angle + tilt)
    u, v = (across * cos + down * sin) * squeeze, (down * cos - across * sin) / squeeze
    u, v = u * np.sqrt(lesion.aspect), v / np.sqrt(lesion.aspect)
    theta = np.arctan2(v, u)
    harmonics = np.arange(2, 2 + len(lesion.ripple))[:, None, None]
    waves = lesion.ripple[:, 0, None, None] * np.cos(harmonics * theta + lesion.ripple[:, 1, None, None])
    relative = 1 + waves.sum(axis=0)
    for at, length, width in lesion.spikes:
        away = np.angle(np.exp(1j * (theta - at)))
        relative = relative + length * np.exp(-np.abs(away) / width)
    return (np.hypot(u, v) - lesion.radius_mm * np.maximum(relative, 0.3)).astype(np.float32)


def _insert_lesion(
    lesion: Lesion, echo_db: Array, loss: Array, excess: Array, rng: np.random.Generator, pixel_mm: float
) -> tuple[Array, Array]:
    """Return echogenicity and attenuation with the lesion and its rim in place."""
    inside = 1 / (1 + np.exp(np.clip(excess / 0.12, -30, 30)))
    texture = _smooth_noise(rng, excess.shape, (0.7 / pixel_mm, 0.9 / pixel_mm)) * 2.0
    rim = lesion.rim_db * np.exp(-((excess / lesion.rim_mm) ** 2))
    echo_db = echo_db * (1 - inside) + (lesion.echo_db + texture) * inside + rim
    return echo_db.astype(np.float32), (loss * (1 - inside) + lesion.loss_db_mm * inside).astype(np.float32)


def _b_mode(
    echo_db: Array, loss: Array, scanner: Scanner, depth: Array, rng: np.random.Generator, pixel_mm: float
) -> NDArray[np.uint8]:
    """Return the log-compressed image (rows, columns) uint8 of scatterers of the given echogenicity (dB)."""
    scatterers = rng.standard_normal((2, *echo_db.shape), dtype=np.float32)
    beam = ndimage.gaussian_filter1d(np.cumsum(loss, axis=0) * pixel_mm, 0.4 / pixel_mm, axis=1)
    compensated_db = echo_db - beam + _gain_compensation(depth)
    field = (scatterers[0] + 1j * scatterers[1]) * 10 ** (compensated_db / 20)
    echo = _point_spread(field, scanner, depth[:, 0], pixel_mm)
    noise = 10 ** ((-52 + 0.25 * depth) / 20) * rng.standard_normal(echo.shape)
    level_db = 20 * np.log10(np.abs(echo) + np.abs(noise) + 1e-6)
    white_db = 13.0 - scanner.gain_db
    return np.clip((level_db - white_db) / scanner.dynamic_range_db * 255 + 255, 0, 255).astype(np.uint8)


def _gain_compensation(depth: Array) -> Array:
    """Return the operator's gain (dB) at each depth (mm): the mean loss of tissue, a little short of it far down."""
    return (0.88 * depth - 0.003 * depth**2).astype(np.float32)


def _point_spread(field: Complex, scanner: Scanner, depth_mm: Array, pixel_mm: float) -> Complex:
    """Return the scatterer field (rows, columns) seen through a Gaussian beam, at constant speckle power.

    The lateral width grows hyperbolically away from the focus, so each row has its own kernel: applied in Fourier space.
    """
    axial = scanner.axial_mm / pixel_mm
    lateral = scanner.lateral_mm / pixel_mm * np.sqrt(1 + ((depth_mm - scanner.focus_mm) / 14.0) ** 2)
    frequency = np.fft.fftfreq(field.shape[1])
    transfer = np.exp(-2 * (np.pi * frequency[None] * lateral[:, None]) ** 2)
    beam = np.fft.ifft(np.fft.fft(field, axis=1) * transfer, axis=1)
    blurred = ndimage.gaussian_filter1d(beam, axial, axis=0)
    power = 1 / (2 * np.sqrt(np.pi) * axial) / (2 * np.sqrt(np.pi) * lateral)
    return blurred / np.sqrt(power)[:, None]


def _framed(pixels: NDArray[np.uint8], border: int, scale: bool) -> NDArray[np.uint8]:
    """Return the picture in its black frame, with a tick every 10 mm of depth where `scale` is true."""
    framed = np.pad(pixels, border)
    if scale and border >= 4:
        rows = border + np.arange(0, pixels.shape[0], max(1, pixels.shape[0] * 10 // int(DEPTH_MM)))
        framed[rows, -border + 1 : -border + 1 + border // 2] = 200
    return framed
