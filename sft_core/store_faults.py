"""What a fault of an object store means: whether it may pass, and what its user can do.

In: any exception of an fsspec file system (s3fs turns an answer of the server into an OSError whose cause keeps the
server's own code). Out: a code, a yes or no, a sentence.
"""

import errno
import tempfile

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES)


def code_of(error: BaseException) -> str:
    """The server's own word for a fault, such as `NoSuchBucket`; empty where the client does not keep it."""
    answer = getattr(error.__cause__ or error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def may_pass(error: Exception) -> bool:
    """Whether another try may go well: the network, a server that restarts or is busy."""
    if isinstance(error, OSError):
        return not isinstance(error, PermissionError) and error.errno not in LASTING
    lasting = isinstance(error, ValueError | TypeError | NotImplementedError | ImportError | LookupError)
    return not lasting and "Credentials" not in type(error).__name__


def words_of(error: Exception) -> str:
    """What happened and what to do."""
    name = type(error).__name__
    said = f"{code_of(error) or name}: {next(iter(str(error).splitlines()), '')}"
    if isinstance(error, PermissionError):
        return (
            f"access refused ({said}); check the credentials (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE) and what the bucket's policy allows them"
        )
    if "Credentials" in name or "Profile" in name:
        return (
            f"no credentials ({said}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the "
            "environment of this process"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; make room in {tempfile.gettempdir()} of this machine, or set TMPDIR to a larger disk"
    if "Connect" in name or "Timeout" in name:
        return f"the store cannot be reached ({said}); check AWS_ENDPOINT_URL and the network, and run again"
    return f"{said}; run again"
