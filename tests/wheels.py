# SPDX-License-Identifier: BSD-3-Clause
"""A package of one line as a wheel, for tests that install one."""

import base64
import hashlib
import io
import zipfile


def wheel(module="tiny_answer"):
    """A package of one line as a wheel: (file name, bytes)."""
    metadata = f"{module}-1.0.dist-info"
    files = {
        f"{module}.py": "ANSWER = 42\n",
        f"{metadata}/METADATA": f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n",
        f"{metadata}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(text)}\n")
    files[f"{metadata}/RECORD"] = "".join([*lines, f"{metadata}/RECORD,,\n"])
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return f"{module}-1.0-py3-none-any.whl", content.getvalue()
