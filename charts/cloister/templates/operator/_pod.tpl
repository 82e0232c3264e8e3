{{/* The operator's settings (operator/src/settings.rs): the same for `run` and `release`. */}}
{{- define "cloister.operatorEnv" -}}
{{- $fullname := include "cloister.fullname" . -}}
{{- $env := dict
  "API_URL" (ternary (printf "http://%s-runtime.%s.svc:%v" $fullname .Release.Namespace .Values.api.runtimeService.port) .Values.operator.api.url .Values.api.enabled)
  "API_TOKEN_FILE" "/run/secrets/cloister-api/token"
  "NAMESPACE" .Release.Namespace
  "LEASE_NAME" (printf "%s-operator" $fullname)
  "LISTEN" "0.0.0.0:8083"
  "LOG_FORMAT" .Values.log.format
  "LOG_FILTER" .Values.log.filter
  "NAMESPACE_PREFIX" .Values.operator.namespacePrefix
  "RUNTIME_IMAGE" (include "cloister.image" (list $ .Values.runtime.image))
  "RUNTIME_IMAGE_PULL_POLICY" .Values.image.pullPolicy
  "MAX_CONCURRENT_ROLLOUTS" .Values.runtime.maxConcurrentRollouts
  "ALLOWED_RUNTIME_CLASSES" (join "," .Values.runtime.allowedRuntimeClasses)
  "ALLOWED_PRIORITY_CLASSES" (join "," .Values.runtime.allowedPriorityClasses)
  "DNS_CIDRS" (join "," .Values.dns.cidrs)
  "DENIED_CIDRS" (join "," .Values.network.deniedCidrs)
  "API_CIDRS" (join "," .Values.runtime.apiCidrs)
-}}
{{- if .Values.api.enabled -}}
{{- $labels := list -}}
{{- range $key, $value := include "cloister.selector" (list $ "api") | fromYaml -}}
{{- $labels = append $labels (printf "%s=%s" $key $value) -}}
{{- end -}}
{{- $_ := merge $env (dict "API_NAMESPACE" .Release.Namespace "API_PORT" "8081" "API_POD_LABELS" (join "," $labels)) -}}
{{- end -}}
{{- range $name, $value := $env }}
{{- if $value }}
- {name: CLOISTER_OPERATOR__{{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}
- name: CLOISTER_OPERATOR__IDENTITY
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- with .Values.operator.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The operator's credential for the api: a token that the API server makes for this audience alone, or a key. */}}
{{- define "cloister.operatorCredential" -}}
- name: api-credential
  {{- if .Values.api.enabled }}
  projected:
    sources:
      - serviceAccountToken: {audience: cloister-api, expirationSeconds: 3600, path: token}
  {{- else }}
  secret:
    secretName: {{ .Values.operator.api.existingSecret }}
    items:
      - {key: {{ .Values.operator.api.secretKey }}, path: token}
  {{- end }}
{{- end -}}
