"""Videos for tests, made with PyAV: a color that stays, or a shade that grows."""

import numpy as np


def write_video(file, shades, size=(32, 24), rate=4):
    """A video with a frame for each shade, or color; returns the file."""
    import av

    width, height = size
    with av.open(str(file), "w") as opened:
        stream = opened.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for shade in shades:
            picture = np.empty((height, width, 3), dtype=np.uint8)
            picture[:] = shade
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                opened.mux(packet)
        for packet in stream.encode(None):
            opened.mux(packet)
    return file
