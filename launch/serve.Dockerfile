# Serves a model from a container that writes nothing and reaches nothing.
#   docker build -f launch/serve.Dockerfile -t unimed-serve .
#   docker run --rm --read-only --cap-drop=ALL --security-opt=no-new-privileges --pids-limit=256 --memory=8g \
#     -v /path/of/model:/model:ro -v /path/of/token:/run/secrets/token:ro -p 127.0.0.1:8000:8000 \
#     unimed-serve --token-file=/run/secrets/token
# The token must be readable by user 65532. Without a network at the hospital: build elsewhere, then `docker save unimed-serve |
# zstd > unimed.tar.zst` and `zstd -d < unimed.tar.zst | docker load` there. Building without an index needs the folder
# `wheels` here (`pip download -d wheels '.[serve,dicom]' hatchling` elsewhere): --build-arg PIP_ARGUMENTS="--no-index --find-links=/src".
FROM python:3.12-slim AS build
ARG PIP_ARGUMENTS=""
ARG EXTRAS="serve,dicom"
# The wheels of an offline build, if there are any, lie beside them.
COPY pyproject.toml README.md LICENSE wheel[s] /src/
COPY unimed_jax /src/unimed_jax
# hadolint ignore=SC2086
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir $PIP_ARGUMENTS "/src[$EXTRAS]"

FROM python:3.12-slim
COPY --from=build /venv /venv
# Nobody: the model and the token are mounted, and there is nothing to write.
USER 65532:65532
WORKDIR /
ENV PATH=/venv/bin:$PATH HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu
EXPOSE 8000
# SIGTERM lets those that wait have their answers; give `docker stop --time=150`.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "unimed_jax.main", "serve", "--run=/model", "--host=0.0.0.0", "--port=8000"]
