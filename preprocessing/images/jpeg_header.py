"""The size of a JPEG image, read from the segments before its first scan. Leaves everything unusual to Pillow.

Pillow makes dictionaries of all that a header says, which takes longer than to read the file. Whether it would open a
file is decided here only where that is certain: what this module knows, Pillow opens, and with the same size.
"""

_START, _SCAN, _TABLES = b"\xff\xd8\xff", 0xDA, 0xDB
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # Huffman-coded: baseline, extended, progressive
_PLAIN = frozenset((0xC4, 0xDD, 0xFE, *range(0xE3, 0xED), 0xEF))  # Pillow looks at no byte in them
_NEEDED = {0xE0: (b"JFIF", 7), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 7)}  # bytes that Pillow reads of such
_PARSED = {0xE1: b"Exif\0\0", 0xE2: b"MPF\0", 0xED: b"Photoshop 3.0\0"}  # may be broken in ways that Pillow refuses
_LONGEST = 14  # of these names


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) in pixels of the JPEG file `data`, both at least 1; None when only Pillow can tell.

    That is so for other formats, for broken or truncated headers, and for segments of Exif, MPO and Photoshop. Pixel
    data are not looked at (ITU-T T.81, annex B).
    """
    if data[:3] != _START:
        return None
    size = None
    start, whole = 2, len(data) - 4
    while start <= whole and data[start] == 0xFF:
        marker = data[start + 1]
        first = start + 4
        start += 2 + (data[start + 2] << 8 | data[start + 3])  # the next segment
        if start < first or start > len(data):
            return None
        if marker == _SCAN:
            return size
        if marker in _PLAIN:
            continue
        if marker == _TABLES:
            if not _are_tables(data, first, start):
                return None
        elif marker in _FRAMES:
            if size is not None or (size := _frame_size(data[first:start])) is None:
                return None
        elif not _is_application(data, marker, first, start):
            return None
    return None


def _are_tables(data: bytes | memoryview, start: int, end: int) -> bool:
    """Whether the segment holds whole quantisation tables: a byte, then 64 values of one or two bytes, each."""
    while start < end:
        start += 65 if data[start] < 16 else 129
    return start == end


def _frame_size(frame: bytes | memoryview) -> tuple[int, int] | None:
    """Of a frame of 8 bits with 1, 3 or 4 components: precision, height, width, components, 3 bytes of each."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    return (width, height) if width and height else None


def _is_application(data: bytes | memoryview, marker: int, start: int, end: int) -> bool:
    """Whether it is an application's segment of which Pillow reads nothing, or no more than is there."""
    if not 0xE0 <= marker <= 0xEE:
        return False
    name = bytes(data[start : min(end, start + _LONGEST)])
    if marker in _PARSED and name.startswith(_PARSED[marker]):
        return False
    prefix, least = _NEEDED.get(marker, (b"", 0))
    return end - start >= least or not name.startswith(prefix)
