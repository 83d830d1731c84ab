"""Tell early whether the Hugging Face hub answers, for its libraries retry a missing network for most of a minute."""

import ssl
import urllib.error
import urllib.request

_TIMEOUT_SECONDS = 10


def unreachable() -> str | None:
    """Return why the hub cannot be asked, in a few words, or None when it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # It answered, if only to say no.
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # Certificates are found differently by the hub's own client: let that one try.
        return None if isinstance(reason, ssl.SSLError) else f"the hub does not answer: {reason}"
    return None
