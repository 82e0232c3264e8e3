{{/* Where the database is, and how to log: all that a migration needs. */}}
{{- define "cloister.databaseEnv" -}}
- name: CLOISTER_DATABASE__URL
{{- if eq .Values.database.type "sqlite" }}
  value: sqlite:///var/lib/cloister/cloister.db
{{- else }}
  valueFrom: {secretKeyRef: {name: {{ .Values.database.postgres.existingSecret }}, key: {{ .Values.database.postgres.secretKey }}}}
{{- end }}
- {name: CLOISTER_DATABASE__MAX_CONNECTIONS, value: {{ .Values.database.maxConnections | quote }}}
- {name: CLOISTER_LOG__FORMAT, value: {{ .Values.log.format }}}
- {name: CLOISTER_LOG__FILTER, value: {{ .Values.log.filter | quote }}}
{{- end -}}

{{/* All that `cloister serve` is told by variables. They go before api.config. */}}
{{- define "cloister.apiEnv" -}}
{{ include "cloister.databaseEnv" . }}
- {name: CLOISTER_SERVER__LISTEN, value: 0.0.0.0:8080}
- {name: CLOISTER_SERVER__RUNTIME_LISTEN, value: 0.0.0.0:8081}
- {name: CLOISTER_SERVER__SHUTDOWN_SECONDS, value: {{ .Values.api.shutdownSeconds | quote }}}
- name: CLOISTER_SECRETS__KEY
  valueFrom: {secretKeyRef: {name: {{ include "cloister.secretName" . }}, key: key}}
- name: CLOISTER_ADMIN__KEY
  valueFrom: {secretKeyRef: {name: {{ include "cloister.secretName" . }}, key: admin-key, optional: true}}
- name: CLOISTER_CLUSTER__OPERATOR_KEY
  valueFrom: {secretKeyRef: {name: {{ include "cloister.secretName" . }}, key: operator-key, optional: true}}
{{- with .Values.redis.existingSecret }}
- name: CLOISTER_REDIS__URL
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.redis.secretKey }}}}
{{- end }}
{{- if .Values.api.config }}
- {name: CLOISTER_CONFIG, value: /etc/cloister/cloister.toml}
{{- end }}
{{- if .Values.cluster.enabled }}
- {name: CLOISTER_CLUSTER__ENABLED, value: "true"}
{{- end }}
{{- if .Values.operator.enabled }}
- {name: CLOISTER_CLUSTER__OPERATOR_SERVICE_ACCOUNT, value: {{ .Release.Namespace }}/{{ include "cloister.fullname" . }}-operator}
{{- end }}
{{- with .Values.api.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The container that brings the schema up to date: before the api in its pod, or in a Job of its own. */}}
{{- define "cloister.migrate" -}}
name: migrate
image: {{ include "cloister.image" (list . .Values.api.image) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [migrate]
env: {{- include "cloister.databaseEnv" . | nindent 2 }}
securityContext: {{- include "cloister.securityContext" . | nindent 2 }}
resources: {{- toYaml .Values.api.resources | nindent 2 }}
volumeMounts: {{- include "cloister.dataMounts" . | nindent 2 }}
{{- end -}}

{{/* What the api and its migration write and read: the database's file, room for its sorting, and what the values add. */}}
{{- define "cloister.dataMounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if eq .Values.database.type "sqlite" }}
- {name: data, mountPath: /var/lib/cloister}
{{- end }}
{{- with .Values.api.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "cloister.dataVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 256Mi}
{{- if eq .Values.database.type "sqlite" }}
- name: data
  {{- with .Values.database.sqlite.persistence }}
  {{- if .enabled }}
  persistentVolumeClaim: {claimName: {{ .existingClaim | default (printf "%s-data" (include "cloister.fullname" $)) }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
  {{- end }}
{{- end }}
{{- with .Values.api.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Whether the api speaks to the Kubernetes API: it reviews its operator's tokens, and writes Tenants. */}}
{{- define "cloister.apiUsesCluster" -}}
{{- if or .Values.operator.enabled .Values.cluster.enabled }}true{{ end -}}
{{- end -}}
