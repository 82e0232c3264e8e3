{{/*
What no single value's schema can say: each is refused with the fields and the remedy. Included by the first template, so
that lint, template, install and upgrade all check.
*/}}
{{- define "cloister.checks" -}}
{{- $sqlite := eq .Values.database.type "sqlite" -}}
{{- if not (or .Values.api.enabled .Values.operator.enabled) -}}
{{- fail "api.enabled and operator.enabled are both false: there is nothing to install" -}}
{{- end -}}
{{- if .Values.api.enabled -}}
{{- if and $sqlite (gt (int .Values.api.replicas) 1) -}}
{{- fail (printf "api.replicas is %d, but database.type is sqlite, which serves one process: set api.replicas to 1, or database.type to postgres with database.postgres.existingSecret" (int .Values.api.replicas)) -}}
{{- end -}}
{{- if and $sqlite .Values.api.autoscaling.enabled -}}
{{- fail "api.autoscaling.enabled needs database.type: postgres: sqlite serves one process" -}}
{{- end -}}
{{- if and .Values.api.autoscaling.enabled (gt (int .Values.api.autoscaling.minReplicas) (int .Values.api.autoscaling.maxReplicas)) -}}
{{- fail "api.autoscaling.minReplicas is above api.autoscaling.maxReplicas: raise the latter" -}}
{{- end -}}
{{- if and (not $sqlite) (not .Values.database.postgres.existingSecret) -}}
{{- fail "database.postgres.existingSecret is empty: name a Secret whose key database.postgres.secretKey has the URL (kubectl create secret generic cloister-postgres --from-literal=url=postgres://…)" -}}
{{- end -}}
{{- if not (or .Values.secrets.existingSecret .Values.secrets.key) -}}
{{- fail "secrets.existingSecret is empty: name a Secret that has `key` (kubectl create secret generic cloister-secrets --from-literal=key=\"$(openssl rand -base64 32)\"), or set secrets.key" -}}
{{- end -}}
{{- if and .Values.secrets.existingSecret (or .Values.secrets.key .Values.secrets.adminKey) -}}
{{- fail "secrets.existingSecret and secrets.key or secrets.adminKey are both set: the keys are either the Secret's or the release's; remove one" -}}
{{- end -}}
{{- if and $sqlite .Values.redis.existingSecret -}}
{{- fail "redis.existingSecret is set, but database.type is sqlite: Redis joins replicas, and sqlite serves one; remove it, or set database.type to postgres" -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.secrets.key (not .Values.secrets.adminKey) -}}
{{- fail "metrics.serviceMonitor.enabled needs secrets.adminKey: the api's metrics are the platform admin's" -}}
{{- end -}}
{{- if and .Values.api.ingress.enabled (not .Values.api.ingress.host) -}}
{{- fail "api.ingress.host is empty: name the host that the Ingress is for" -}}
{{- end -}}
{{- else -}}
{{- if not .Values.operator.api.url -}}
{{- fail "operator.api.url is empty, but api.enabled is false: say where the api's port for workers is" -}}
{{- end -}}
{{- if not .Values.operator.api.existingSecret -}}
{{- fail "operator.api.existingSecret is empty, but api.enabled is false: name a Secret with the api's cluster.operator_key" -}}
{{- end -}}
{{- if not .Values.runtime.apiCidrs -}}
{{- fail "runtime.apiCidrs is empty, but api.enabled is false: say which addresses operator.api.url has, for the tenants' network policies" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.api.enabled (or .Values.runtime.apiCidrs .Values.operator.api.existingSecret) -}}
{{- fail "runtime.apiCidrs and operator.api.existingSecret are for an api elsewhere, but the release has one of its own: set api.enabled to false, or remove them" -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.operator.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.operator.metricsFrom) -}}
{{- fail "metrics.serviceMonitor.enabled needs networkPolicy.operator.metricsFrom: say which pods may scrape the operator" -}}
{{- end -}}
{{- if and .Values.api.enabled .Values.operator.api.url -}}
{{- fail "operator.api.url is set, but the release has an api of its own: set api.enabled to false, or remove operator.api.url" -}}
{{- end -}}
{{- end -}}
