"""Which kind a file is that is no checkpoint, as far as its first bytes tell."""

from __future__ import annotations

LENGTH = 512  # bytes that are looked at

_KINDS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them: use h5py"),
    (b"\x93NUMPY", "a NumPy array: use numpy.load"),
    (b"GGUF", "a GGUF file: use llama.cpp"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS: run git lfs pull"),
)


def kind(head: bytes, magic: bytes) -> str:
    r"""What to say of a file with these first bytes; empty when they tell nothing.

    Example:
        >>> kind(b"\x93NUMPY...", b"magic")
        ': it is a NumPy array: use numpy.load'
    """
    for start, text in _KINDS:
        if head.startswith(start):
            return f": it is {text}"
    if magic.replace(b"\r\n", b"\n") in head[: len(magic)] or magic[1:] in head[: len(magic)]:
        return ": it was one and is damaged, as if transferred as text: transfer it as binary"
    if head.startswith(b"PK\3\4"):
        torch_save = b"/data.pkl" in head or b"/.format_version" in head
        return f": it is {'a torch.save file: use torch.load' if torch_save else 'a zip archive'}"
    if b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head[:32]:
        return ": it is a torch.save file of the old kind: use torch.load"
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        return ": it is a pickle, which may run any code when it is loaded"
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return ": it is a safetensors file: use safetensors.torch.load_file"
    if head[257:262] == b"ustar":
        return ": it is a tar archive"
    if head[:5] in (b"<!DOC", b"<html"):
        return ": it is a web page, so the download went wrong"
    return ""
