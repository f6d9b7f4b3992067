"""Limits of images, the same in preparation and in training. A leaf that anyone may import."""

MAX_PIXELS = 50_000_000  # larger than any photo of the usual sets; decoding one takes 150 MB
PILLOW_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: beyond it Pillow itself refuses to open a file

# Bytes that a text or a color profile in a PNG may unpack to, for PngImagePlugin.MAX_TEXT_CHUNK. Pillow's own bound of
# 1 MiB refuses valid images of many programs. Pillow holds all texts of a file together to 64 MiB.
MAX_PNG_TEXT = 64 << 20
