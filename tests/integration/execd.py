# SPDX-License-Identifier: BSD-3-Clause
"""An image whose slots start by exec: the image minimal with launch = "exec"."""

from contextlib import contextmanager

NAME = "execd"
ADD = """
root=$(dirname /var/lib/nbagent/images/sha256-*/rootfs/usr)
mkdir -p /root/execd/extra/etc
cd /root/execd/extra
sed 's/^python = /launch = "exec"\\n&/' $root/etc/nbagent-image.toml > etc/nbagent-image.toml
{more}
options="--owner=0 --group=0 --numeric-owner -f ../image.tar"
tar -c $options --exclude=./etc/nbagent-image.toml -C $root .
tar -r $options *
nbagent image add --name execd ../image.tar
"""


@contextmanager
def execd_image(agent, more=""):
    """Adds the image; `more` is a script that adds files to it, in a directory for them."""
    def trees():
        return agent.run("sh", "-c", "ls -d /var/lib/nbagent/images/sha256-*").split()

    before = trees()
    try:
        agent.run("sh", "-ec", ADD.format(more=more))
        yield NAME
    finally:
        agent.run("rm", "-rf", "/root/execd")
        agent.run("nbagent", "image", "remove", NAME)
        for slot in agent.slots():
            if slot["image"] == NAME:
                agent.release(slot["slot"])
        agent.wait(lambda: trees() == before, "the deletion of the image")
